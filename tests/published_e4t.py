"""What the public E4T program saves, at any size and with random weights, and its encoder as it is there, unfolded.

mkshing/e4t-diffusion: e4t/encoder.py (E4TEncoder), e4t/weightoffsets.py, e4t/models/cross_attention.py, the config.json
of its released domain; the vision tower is mlfoundations/open_clip 2.16's VisionTransformer with `output_tokens`.
"""

import json
from collections import OrderedDict

import torch
from torch import nn

from offsets import public, published

CONFIG = {
    "pretrained_model_name_or_path": "CompVis/stable-diffusion-v1-4", "placeholder_token": "*s", "reg_lambda": 0.01,
    "clip_model_name_or_path": "ViT-H-14::laion2b_s32b_b79k", "domain_class_token": "face", "domain_embed_scale": 0.1,
    "prompt_template": "face", "unfreeze_clip_vision": False, "resolution": 512, "learning_rate": 1.6e-05,
    "scale_lr": True,
}
BLOCKS = {  # attention's place -> level, of which it has the width
    **{f"down_blocks.{k}.attentions.{j}": k for k in range(3) for j in range(2)}, "mid_block.attentions.0": 3,
    **{f"up_blocks.{k}.attentions.{j}": 3 - k for k in (1, 2, 3) for j in range(3)},
}


class Block(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, inner), gelu=nn.GELU(),
                                             c_proj=nn.Linear(inner, width)))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Visual(nn.Module):
    """OpenCLIP's vision tower: (pooled, patch tokens), of which the first alone is normalised."""

    def __init__(self, width, heads, layers, patch, size, inner):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(Block(width, heads, inner) for _ in range(layers)))

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer.resblocks(self.ln_pre(x))
        return self.ln_post(x[:, 0]), x[:, 1:]


class E4TEncoder(nn.Module):
    def __init__(self, d=768, width=32, heads=2, layers=2, patch=8, size=32, inner=64, felt=80):
        super().__init__()
        self.clip_vision = Visual(width, heads, layers, patch, size, inner)
        self.unet_feature_embedder = nn.Sequential(nn.Linear(felt, width), nn.LeakyReLU(), nn.Linear(width, width))
        self.feature_linear = nn.Linear(2 * width, width)
        self.first_linears = nn.ModuleList(nn.Linear(width, width) for _ in range((size // patch) ** 2 // 2 + 1))
        self.act = nn.LeakyReLU()
        self.final_linear = nn.Linear(width, d)

    def forward(self, x, samples):
        """E (b, d) of prepared pictures (b, 3, size, size) and the UNet's answers, each (b, c, h, w)."""
        u = self.unet_feature_embedder(torch.cat([sample.mean((2, 3)) for sample in samples], -1))
        pooled, tokens = self.clip_vision(x)
        h = torch.cat([pooled[:, None], tokens[:, 1::2]], 1)
        each = [linear(self.feature_linear(torch.cat([h[:, i], u], -1))) for i, linear in enumerate(self.first_linears)]
        return self.final_linear(self.act(torch.stack(each).mean(0)))


def encoder(seed=0, **sizes):
    """An encoder with norms that do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = E4TEncoder(**sizes)
        for p in made.parameters():
            if p.ndim == 1:
                p.data += 0.3 * torch.randn_like(p)
    return made.half().float().requires_grad_(False).eval()  # as programs that load towers in fp16 have them


def offsets(widths=(4, 6, 8, 8), context=10, seed=0, scale=0.3):
    """weight_offsets.pt of a UNet whose levels have these widths."""
    found = OrderedDict()
    for block, level in BLOCKS.items():
        for attn in ("attn1", "attn2"):
            for part in "qkv":
                d_in = context if attn == "attn2" and part != "q" else widths[level]
                for name, t in public(widths[level], d_in, seed=seed + len(found), dtype=torch.float32).items():
                    small = scale / (t.shape[1] ** 0.5 if t.ndim == 2 else 1)
                    found[f"{block}.transformer_blocks.0.{attn}.wo_{part}.{name}"] = small * t
    return found


def change(state, module):
    """Δ (d_out, d_in) of one module of `offsets`, in fp64."""
    return published({name.removeprefix(f"{module}."): t.double() for name, t in state.items()
                      if name.startswith(f"{module}.")})


def save(folder, encoder_state, offset_state, config=CONFIG):
    """A folder as `pretrain_e4t.py` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(OrderedDict(encoder_state), folder / "encoder.pt")
    torch.save(OrderedDict(offset_state), folder / "weight_offsets.pt")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
