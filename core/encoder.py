"""E4T's encoder: a picture becomes the offset of a word embedding (Gal et al. 2023, arXiv 2302.12228), and what
Perfusion's values answer beside it.

    f_l (w)      the class token after every second layer of a vision tower, of the clean picture
    h  = LeakyReLU(mean_l (A_l f_l + a_l))          each of the linear layers into HIDDEN
    E  = W h + w             v* = v(superclass) + SCALE E        R = |SCALE E|² / |v(superclass)|², mean over the batch
    u_p = U_p h + u_p        for each value projection p: its o* is W_p i* + u_p

The order of linear layer, mean and LeakyReLU is the paper's, and so is SCALE. W, w, U and u start at zero, so that a
picture starts as the superclass word.

The paper's encoder also reads the UNet's down blocks, of the picture with noise, and answers anew at each step of
sampling. A concept is constant, so such answers have to be averaged; and those blocks told nothing that the tower had
not told (bench/research.md), so they are not read here. The u are new, as is R's measure: the paper's |E|² is relative
to a text encoder's size of words, and CLIP's are small.

SD1.5 with CLIP-ViT-H-14: 16 class tokens of 1280 and 16 value projections, 43.2 M numbers, 82 MB in fp16.

Letters: b batch · l layers kept of the tower · w its width · d of each text encoder · d_out of a projection.
"""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 0.1
HIDDEN = 1280
SLOPE = 0.1  # of LeakyReLU, as in yoctta/sd_personalization_encoder


class Encoder(nn.Module):
    """`layers` class tokens of `width`, `embeddings`: d by text encoder, and `values`: d_out by value projection."""

    def __init__(self, layers: int, width: int, embeddings: Mapping[str, int], values: Mapping[str, int],
                 hidden: int = HIDDEN):
        super().__init__()
        self.tower = nn.ModuleList(nn.Linear(width, hidden) for _ in range(layers))
        self.out = nn.ModuleDict({name: nn.Linear(hidden, d) for name, d in embeddings.items()})
        # a module's name may hold no dots
        self.values = nn.ModuleDict({name.replace(".", "/"): nn.Linear(hidden, d) for name, d in values.items()})
        for layer in (*self.out.values(), *self.values.values()):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Encoder":
        """The encoder that has these tensors. Raises KeyError, ValueError or RuntimeError where they are none."""
        hidden, width = state["tower.0.weight"].shape
        layers = sum(key.startswith("tower.") for key in state) // 2
        out, values = ({key.split(".")[1]: len(t) for key, t in sorted(state.items())
                        if re.fullmatch(rf"{part}\..*weight", key)} for part in ("out", "values"))
        with torch.device("meta"):
            encoder = cls(layers, width, out, values, hidden)
        encoder.load_state_dict(state, assign=True)
        return encoder.requires_grad_(False).eval()

    @staticmethod
    def read(states: Sequence[Tensor]) -> Tensor:
        """f (b, l, w) of a tower's hidden states (b, n, w) after each layer."""
        return torch.stack([x[:, 0] for x in states[1::2]], 1)

    @torch.no_grad()
    def standardise(self, seen: Tensor):
        """Begin, for class tokens (m, l, w) like these, around zero and with every layer's of one size.

        One size for a layer's own numbers, or whitening them, makes learning slower: what a tower knows is large.
        """
        for layer, f in zip(self.tower, seen.to(self.tower[0].weight).unbind(1), strict=True):
            layer.weight /= (f - f.mean(0)).square().mean().sqrt()
            layer.bias -= layer.weight @ f.mean(0)

    def forward(self, seen: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """E (b, d) for each text encoder and u (b, d_out) for each value projection, of class tokens (b, l, w)."""
        h = torch.stack([layer(f) for layer, f in zip(self.tower, seen.unbind(1), strict=True)]).mean(0)
        h = F.leaky_relu(h, SLOPE)
        return ({name: layer(h) for name, layer in self.out.items()},
                {name.replace("/", "."): layer(h) for name, layer in self.values.items()})


def embedding(superclass: Mapping[str, Tensor], E: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """v* (b, d) of each text encoder, from the superclass word's embedding (d) and E (b, d)."""
    # in fp32 or wider: in half precision a small offset would be lost in the sum
    wide = {name: e.to(torch.promote_types(e.dtype, torch.float32)) for name, e in E.items()}
    return {name: superclass[name].to(e) + SCALE * e for name, e in wide.items()}


def penalty(superclass: Mapping[str, Tensor], E: Mapping[str, Tensor]) -> Tensor:
    """R, summed over the text encoders."""
    return sum((SCALE * e.float()).square().sum(-1).mean() / superclass[name].to(e).float().square().sum()
               for name, e in E.items())
