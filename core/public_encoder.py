"""The encoder of the public E4T files, which is not the paper's (mkshing/e4t-diffusion, e4t/encoder.py, E4TEncoder).

    h_i (w)     the class token of a vision tower's last layer, after ln_post, then every second of its patch tokens as
                the layer left them: 129 of ViT-H-14. (The paper takes every second layer; open_clip 2.16, with which
                it was trained, normalises the class token alone.)
    g           what the UNet answers at 13 places of its way down, mean over positions, side by side; with the weight
                offsets, and asked with the empty prompt
    u = L₂ LeakyReLU(L₁ g + l₁) + l₂
    E = W LeakyReLU(mean_i(F_i (A [h_i, u] + a) + f_i)) + w

From h_i, and from u's LeakyReLU, to the mean all is linear, so it is one map for each, exactly:

    mean_i(G_i h_i) + M LeakyReLU(L₁ g + l₁) + m
    G_i = F_i A_h      M = mean(F_i) A_u L₂      m = mean(F_i (A_u l₂ + a) + f_i)

With ViT-H-14: 227.9 M numbers, 435 MB in fp16; the file has 3.45 GB in fp32, the tower in it. Letters: b batch ·
l tokens · w the tower's width · d of the text encoder. G is `tower`, L₁ `unet`, M and m `join`, W and w `out`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.01  # of LeakyReLU
POSITIONS = "clip_vision.positional_embedding"  # as many as the tower has tokens


class PublicEncoder(nn.Module):
    """`tokens` of a tower of `width`, `felt` numbers of the UNet, and `embeddings`: d by text encoder."""

    def __init__(self, tokens: int, width: int, felt: int, embeddings: Mapping[str, int], hidden: int):
        super().__init__()
        self.ln_post = nn.LayerNorm(width)
        self.tower = nn.Linear(tokens * width, hidden, bias=False)
        self.unet = nn.Linear(felt, hidden)
        self.join = nn.Linear(hidden, hidden)
        self.out = nn.ModuleDict({name: nn.Linear(hidden, d) for name, d in embeddings.items()})

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "PublicEncoder":
        """The encoder that has these tensors. Raises KeyError, ValueError or RuntimeError where they are none."""
        (hidden, felt), (width,) = state["unet.weight"].shape, state["ln_post.weight"].shape
        out = {key.split(".")[1]: len(t) for key, t in state.items() if re.fullmatch(r"out\..*weight", key)}
        with torch.device("meta"):
            encoder = cls(state["tower.weight"].shape[1] // width, width, felt, out, hidden)
        encoder.load_state_dict(state, assign=True)
        return encoder.requires_grad_(False).eval()

    @staticmethod
    def read(states: Sequence[Tensor]) -> Tensor:
        """h (b, l, w), before ln_post, of a tower's hidden states (b, n, w) after each layer."""
        return states[-1][:, ::2]  # the class token is the first, so every second patch token is an even one

    def forward(self, seen: Tensor, felt: Sequence[Tensor]) -> dict[str, Tensor]:
        """E (b, d) for each text encoder, of a tower's tokens (b, l, w) and the UNet's pooled places, each (b, w_k)."""
        h = torch.cat([self.ln_post(seen[:, :1]), seen[:, 1:]], 1)
        u = F.leaky_relu(self.unet(torch.cat(list(felt), -1)), SLOPE)
        # a mean of the tokens and not of the maps, whose numbers would be too small for fp16
        mean = self.tower(h.flatten(1) / h.shape[1]) + self.join(u)
        return {name: layer(F.leaky_relu(mean, SLOPE)) for name, layer in self.out.items()}


@contextmanager
def pooled_answers(blocks: Iterable[nn.Module]):
    """While open, the list that it gives gets g (b, w_k) of each block as a UNet runs, in their order."""
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


def fold(tensors: Mapping[str, Tensor]) -> PublicEncoder:
    """The encoder, in fp32, of the state dict of the public E4TEncoder; of its `clip_vision` only ln_post is taken.

    Shapes: `clip_vision.positional_embedding` (2 l − 1, w), `clip_vision.ln_post` (w); the others, each a `.weight`
    with a `.bias`, are `unet_feature_embedder.0` (k, g) and `.2` (k, k), `feature_linear` (k, w + k),
    `first_linears.i` (k, k) for i < l, `final_linear` (d, k). Raises ValueError for anything else.
    """
    came = {name: tuple(t.shape) for name, t in tensors.items()}

    def size(name):
        shape = came.get(name, ())  # a tensor without numbers may say that it has no end of rows
        return shape if len(shape) == 2 and min(shape) > 0 else (0, 0)

    (n, w), (k, g), (d, _) = map(size, (POSITIONS, "unet_feature_embedder.0.weight", "final_linear.weight"))
    tokens = (n + 1) // 2
    layers = {"unet_feature_embedder.0": (k, g), "unet_feature_embedder.2": (k, k), "feature_linear": (k, w + k),
              "final_linear": (d, k)} | {f"first_linears.{i}": (k, k) for i in range(tokens)}
    wanted = {POSITIONS: (n, w), "clip_vision.ln_post.weight": (w,), "clip_vision.ln_post.bias": (w,)}
    wanted |= {f"{name}.weight": shape for name, shape in layers.items()}
    wanted |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    wrong = [f"{name} should be {wanted.get(name, 'absent')} and is {came.get(name, 'absent')}"
             for name in sorted(wanted | came) if came.get(name) != wanted.get(name)
             and (name in wanted or not name.startswith("clip_vision."))]
    if wrong:
        raise ValueError(f"This is not the encoder of the public e4t-diffusion code: {'; '.join(wrong[:3])}"
                         f"{f'; and {len(wrong) - 3} more' if wrong[3:] else ''}. Give encoder.pt as it saves it, "
                         "complete.")

    def layer(name):
        return tensors[f"{name}.weight"].double(), tensors[f"{name}.bias"].double()

    (A, a), (L_2, l_2) = layer("feature_linear"), layer("unet_feature_embedder.2")
    G, F_mean, m = torch.empty(k, tokens * w), torch.zeros(k, k).double(), torch.zeros(k).double()
    for i in range(tokens):
        F_i, f_i = layer(f"first_linears.{i}")
        G[:, i * w : (i + 1) * w] = F_i @ A[:, :w]
        F_mean += F_i / tokens
        m += f_i / tokens
    M, m = F_mean @ A[:, w:] @ L_2, m + F_mean @ (A[:, w:] @ l_2 + a)
    kept = {"ln_post": "clip_vision.ln_post", "unet": "unet_feature_embedder.0", "out.clip_l": "final_linear"}
    kept = {f"{ours}.{kind}": tensors[f"{theirs}.{kind}"].float().clone() for ours, theirs in kept.items()
            for kind in ("weight", "bias")}
    return PublicEncoder.of(kept | {"tower.weight": G, "join.weight": M.float(), "join.bias": m.float()})
