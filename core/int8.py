"""A concept's value outputs in a byte each, for files of half the size.

    scale = max |o| / 127        one for each projection, all of them in one tensor, in the order of the names
    q = round(o / scale)         −127 … 127;  what is read back is q · scale, at most scale / 2 away

The scale is kept in bf16: its eight bits and the seven of q fit into fp32 and fp16 gives them back when rounded anew,
so what is read and written again stays the same file.
"""

import torch
from torch import Tensor

from .file import brief

OUTPUT, SCALES = "target_output.", "target_output_scales"


def narrowed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors with its value outputs (d_out) in int8, and their scales (outputs)."""
    outputs = {name: o.float() for name, o in sorted(tensors.items()) if name.startswith(OUTPUT)}
    scales = torch.stack([o.abs().max() for o in outputs.values()]).clamp(min=1e-30) / 127
    scales = scales.bfloat16()
    small = {name: (o / s).round().clamp(-127, 127).to(torch.int8)
             for (name, o), s in zip(outputs.items(), scales.float())}
    return tensors | small | {SCALES: scales}


def widened(tensors: dict[str, Tensor], name: str, again: str) -> dict[str, Tensor]:
    """The tensors that `narrowed` was given, in fp32. Raises ValueError: `name` is for the message, `again` what to do.
    """
    outputs = sorted(key for key in tensors if key.startswith(OUTPUT))
    if SCALES not in tensors:
        raise ValueError(f"'{name}' has value outputs in int8 and lacks '{SCALES}', by which they are read. {again}")
    scales = tensors[SCALES].float()
    if scales.shape != (len(outputs),):
        raise ValueError(f"'{SCALES}' in '{name}' has shape {brief(tuple(scales.shape))}, one scale for each of "
                         f"{len(outputs)} value outputs was expected. {again}")
    if not (scales.isfinite() & (scales > 0)).all():
        raise ValueError(f"'{SCALES}' in '{name}' holds values that are no scales (NaN, infinite or not above 0). "
                         f"{again}")
    for key in outputs:
        if tensors[key].dtype != torch.int8:
            raise ValueError(f"'{brief(key)}' in '{name}' is {kind(tensors[key])}, int8 was expected. {again}")
    wide = {key: tensors[key].float() * s for key, s in zip(outputs, scales)}
    return {key: wide.get(key, t) for key, t in tensors.items() if key != SCALES}


def kind(tensor: Tensor) -> str:
    """The tensor's number format, as `int8`."""
    return str(tensor.dtype).removeprefix("torch.")
