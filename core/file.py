"""Our files: .safetensors with string metadata, written aside and moved, so that a reader sees the old or the new one.

The same content gives the same bytes: the library writes metadata in a random order, so the header is written here.
"""

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor


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
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]]).get("__metadata__") or {}
    except (SafetensorError, struct.error, KeyError) as error:  # KeyError: a number format that torch lacks
        raise ValueError(f"'{name}' is not a whole .safetensors file ({error}). {again}") from error
    return tensors, metadata


def write(path, data: bytes) -> Path:
    """Put bytes at a path: written aside, flushed, moved over the target, so a reader sees the old file or the new.

    Raises OSError with a sentence where they cannot be written; nothing is left behind then.
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
            os.replace(aside, path)
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
