"""The vision tower that an encoder reads: the hidden states of a CLIP vision model, of which it takes some tokens.

ComfyUI's CLIP_VISION and transformers' CLIPVisionModel answer with the same numbers here: both get pictures from
`prepare`, which crops to the middle square and scales as ComfyUI does, without its rounding to bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .fingerprint import fingerprint, sample

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
AT_ONCE = 16  # pictures


@dataclass(frozen=True)
class Tower:
    """`states` answers the hidden states (b, n, w) after each layer to prepared pictures (b, 3, size, size)."""

    size: int  # pixels a side
    hash: str
    states: Callable[[Tensor], Sequence[Tensor]]


def of_transformers(model) -> Tower:
    """The tower that a CLIPVisionModel of transformers is, on the device on which it is."""
    return Tower(model.config.image_size, hash_of(model.state_dict()),
                 lambda x: model(x.to(model.device), output_hidden_states=True).hidden_states[1:])


def middle(images: Tensor, side: int) -> Tensor:
    """The middle square of pictures (m, H, W, 3) in 0..1, as (m, 3, side, side)."""
    x = images.movedim(-1, 1).float()  # BHWC -> BCHW
    least = min(x.shape[2:])
    top, left = ((length - least) // 2 for length in x.shape[2:])
    x = x[:, :, top : top + least, left : left + least]
    return x if least == side else F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def prepare(images: Tensor, size: int) -> Tensor:
    """Pictures (m, H, W, 3) in 0..1 as CLIP sees them, (m, 3, size, size)."""
    x = middle(images, size)
    mean, std = (torch.tensor(t, device=x.device).view(3, 1, 1) for t in (MEAN, STD))
    return (x - mean) / std


@torch.no_grad()
def tokens_of(tower: Tower, images: Tensor, read: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """What an encoder's `read` takes (m, l, w), in fp32, of pictures (m, H, W, 3) in 0..1."""
    return torch.cat([read(tower.states(part)).float().cpu() for part in prepare(images, tower.size).split(AT_ONCE)])


def hash_of(state: Mapping[str, Tensor]) -> str:
    """The hash of a CLIP vision model's weights, under transformers' names; in fp16, as which some hosts load them."""
    kept = {name.removeprefix("vision_model."): (tuple(w.shape), sample(w).half()) for name, w in state.items()}
    return fingerprint({name: w for name, w in kept.items() if name.startswith(("embeddings.", "pre_", "encoder."))
                        and "position_ids" not in name})
