"""Fingerprint: one hash for models, pictures and settings, by which results are found again on disk.

A tensor counts by its shape, its dtype and a strided sample of its values: two checkpoints never agree in all of
their hundreds of tensors, and reading every byte of one would take longer than a short tune.
"""

import hashlib

import torch

SAMPLE = 61  # values read of each tensor


def fingerprint(*parts) -> str:
    """Hex SHA-256 of nested dicts, lists, strings, numbers and tensors, and of weight adapters by their `weights`."""
    sha = hashlib.sha256()
    for part in parts:
        _add(sha, part)
    return sha.hexdigest()


def exact(tensor: torch.Tensor) -> str:
    """Hex SHA-256 of a tensor with every value, for pictures and masks: two may differ in one pixel."""
    values = tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy()
    return hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode() + values.tobytes()).hexdigest()


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some values of a tensor, evenly strided."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)]


def _add(sha, part):
    if torch.is_tensor(part):
        sha.update(f"{tuple(part.shape)}{part.dtype}".encode())
        sha.update(sample(part).float().cpu().numpy().tobytes())
    elif isinstance(part, dict):
        sha.update(f"{len(part)}{{".encode())
        for key in sorted(part, key=str):
            _add(sha, (key, part[key]))
    elif isinstance(part, (list, tuple)):
        sha.update(f"{len(part)}[".encode())
        for item in part:
            _add(sha, item)
    elif isinstance(part, (str, bytes, int, float, bool, type(None))):
        sha.update(f"{type(part).__name__}:{part!r};".encode())
    elif callable(part):
        sha.update(part.__qualname__.encode())
    else:
        sha.update(type(part).__name__.encode())
        _add(sha, part.weights)
