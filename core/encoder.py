"""E4T's encoder: a picture becomes the offset of a word embedding (Gal et al. 2023, arXiv 2302.12228).

    f_l (w)      the class token after every second layer of a vision tower, of the clean picture
    g_k (w_k)    the UNet's down block k, mean over positions, of the same picture with noise at a time; without the
                 weight offsets and without gradient
    E  = W LeakyReLU(mean{A_l f_l + a_l, B_k g_k + b_k}) + w          each of the linear layers into HIDDEN
    v* = v(superclass) + SCALE E        R = |E|², mean over the batch

The order of linear layer, mean and LeakyReLU is the paper's, and so is SCALE; how the UNet's part joins the tower's is
not said there, and is that of yoctta/sd_personalization_encoder: more members of one mean. W and w start at zero, so
that v* starts as the superclass word.

SD1.5 with CLIP-ViT-H-14: 16 class tokens of 1280, 4 blocks, 31.7 M numbers, 61 MB in fp16.

Letters: b batch · l layers kept of the tower · w its width · d of each text encoder.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 0.1
HIDDEN = 1280
SLOPE = 0.1  # of LeakyReLU, as in yoctta's


class Encoder(nn.Module):
    """`layers` class tokens of `width`, UNet blocks of widths `blocks`, and `embeddings`: d by text encoder."""

    # What it reads of the UNet: asked with this prompt ({} the superclass word), at which places (see Host.features),
    # and whether with the weight offsets.
    prompt, places, modulated = "a photo of a {}", "levels", False

    def __init__(self, layers: int, width: int, blocks: Sequence[int], embeddings: Mapping[str, int],
                 hidden: int = HIDDEN):
        super().__init__()
        self.tower = nn.ModuleList(nn.Linear(width, hidden) for _ in range(layers))
        self.unet = nn.ModuleList(nn.Linear(block, hidden) for block in blocks)
        self.out = nn.ModuleDict({name: nn.Linear(hidden, d) for name, d in embeddings.items()})
        for layer in self.out.values():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Encoder":
        """The encoder that has these tensors. Raises KeyError, ValueError or RuntimeError where they are none."""
        hidden, width = state["tower.0.weight"].shape
        layers, levels = (sum(key.startswith(part) for key in state) // 2 for part in ("tower.", "unet."))
        blocks = [state[f"unet.{k}.weight"].shape[1] for k in range(levels)]
        out = {key.split(".")[1]: len(t) for key, t in state.items() if re.fullmatch(r"out\..*weight", key)}
        with torch.device("meta"):
            encoder = cls(layers, width, blocks, out, hidden)
        encoder.load_state_dict(state, assign=True)
        return encoder.requires_grad_(False).eval()

    @staticmethod
    def read(states: Sequence[Tensor]) -> Tensor:
        """f (b, l, w) of a tower's hidden states (b, n, w) after each layer."""
        return torch.stack([x[:, 0] for x in states[1::2]], 1)

    def forward(self, seen: Tensor, felt: Sequence[Tensor]) -> dict[str, Tensor]:
        """E (b, d) for each text encoder, of a tower's class tokens (b, l, w) and pooled blocks, each (b, w_k)."""
        parts = [layer(x) for layer, x in zip(self.tower, seen.unbind(1), strict=True)]
        parts += [layer(x) for layer, x in zip(self.unet, felt, strict=True)]
        h = F.leaky_relu(torch.stack(parts).mean(0), SLOPE)
        return {name: layer(h) for name, layer in self.out.items()}


@contextmanager
def pooled_answers(blocks: Iterable[nn.Module]):
    """While open, the list that it gives gets g_k (b, w_k) of each block as a UNet runs, in their order."""
    found = []

    def keep(block, inputs, answer):
        x = answer if torch.is_tensor(answer) else answer[0]  # diffusers hands on what the way up needs beside it
        found.append(x.float().mean((2, 3)))

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def embedding(superclass: Mapping[str, Tensor], E: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """v* (b, d) of each text encoder, from the superclass word's embedding (d) and E (b, d)."""
    # in fp32 or wider: in half precision a small offset would be lost in the sum
    wide = {name: e.to(torch.promote_types(e.dtype, torch.float32)) for name, e in E.items()}
    return {name: superclass[name].to(e) + SCALE * e for name, e in wide.items()}


def penalty(E: Mapping[str, Tensor]) -> Tensor:
    """R: the squared length of E, mean over the batch, summed over the text encoders."""
    return sum(e.float().square().sum(-1).mean() for e in E.values())
