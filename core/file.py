"""Our files: .safetensors with string metadata, written aside and moved, so that a reader sees the old or the new one.

The same content gives the same bytes: the library writes metadata in a random order, so the header is written here.
"""

import errno
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

LARGEST_HEADER = 2 * 2**20  # bytes, a cover among them; SDXL's has 11 KB without one
LONGEST = 100  # characters of what a file says, in a sentence of ours


def brief(said) -> str:
    """What a file or a library says, on one line and short enough for a sentence of ours."""
    line = " ".join(str(said)[: 20 * LONGEST].split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a .safetensors file."""
    data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.dumps({"__metadata__": metadata} | json.loads(data[8:end]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + memoryview(data)[end:]  # a slice of bytes would be a copy


def unpacked(data: bytes, name: str, again: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file's bytes. Raises ValueError: `name` is for the message, `again` what to do."""
    try:
        (header,) = struct.unpack("<Q", data[:8])
        if header > min(LARGEST_HEADER, len(data) - 8):  # before anything is made room for
            raise ValueError(f"a header of {header} bytes in {len(data)}")
        tensors = safetensors.torch.load(data)
        if any(t.ndim > 8 for t in tensors.values()):  # torch makes tensors that it cannot compute with
            raise ValueError("a tensor of more than 8 dimensions")
        metadata = json.loads(data[8 : 8 + header]).get("__metadata__") or {}
    except Exception as error:  # hostile bytes make a library raise anything, of shapes and of formats that torch lacks
        raise ValueError(f"'{name}' is not a whole .safetensors file ({brief(error)}). {again}") from error
    return tensors, metadata


def write(path, data: bytes, over: bool = True) -> Path:
    """Put bytes at a path: written aside, flushed, moved over the target, so a reader sees the old file or the new.

    Raises OSError with a sentence where they cannot be written; nothing is left behind then. Without `over` that is a
    FileExistsError where there is a file, even one that another process put there meanwhile.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)  # mkstemp's 600 would hide the file from others who share the folder
            os.replace(aside, path) if over else _move_to_free(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"'{path.name}' ({len(data) / 1024:.0f} KB) could not be written to {path.parent}: {error.strerror}. "
            "Nothing was changed there. Make room or choose another folder, then queue again.",
        ) from error
    return path


def _move_to_free(aside, path):
    """Move a file to where there is none. Raises FileExistsError where there is one, in one step with looking."""
    if os.name == "nt":
        return os.rename(aside, path)  # there it takes no other's place
    try:
        os.link(aside, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: looking and moving are two steps
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        return os.replace(aside, path)
    os.unlink(aside)
