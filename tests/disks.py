"""Disks that are small or read-only, for a fork of this process alone: nobody else sees them, and they end with it."""

import ctypes
import os

import pytest

NEW_NAMESPACE, PRIVATE, READ_ONLY, BIND, REMOUNT = 0x00020000, 1 << 18 | 1 << 14, 1, 1 << 12, 1 << 5


def mount(source, target, kind, flags=0, options=""):
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.mount(str(source).encode(), str(target).encode(), kind.encode(), flags, options.encode())
    if found:
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}")


def alone():
    """From now on, what this process mounts is its own."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACE):
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", "/", "", PRIVATE)


def small(folder, size):
    """A disk of so many bytes, on a folder."""
    alone()
    mount("tmpfs", folder, "tmpfs", options=f"size={size}")


def read_only(folder):
    alone()
    mount(folder, folder, "", BIND)
    mount(folder, folder, "", BIND | REMOUNT | READ_ONLY)


needed = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0,
                            reason="DISKS ARE NOT TESTED: only root on Linux may mount a small or a read-only one")
