"""The pictures that the miniature is trained on: drawn once from the world, kept in shards that can be made again.

A shard is a .safetensors file of pictures (m, 3, 128, 128) in bytes, masks (m, 3, 16, 16) in bytes, and all the numbers
of `world.sample`. It is drawn from its own seed, so a lost one comes back as it was.
"""

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

from . import world

SHARD = 1000
LATENT = 16  # side of the miniature's latents


def draw(folder: Path, shards: int, seed: int):
    """Draw the shards that are not there yet."""
    for k in tqdm(range(shards), "drawing", unit="k pictures"):
        path = folder / f"{k:03}.safetensors"
        if path.exists():
            continue
        drawn = world.sample(SHARD, torch.Generator().manual_seed(seed * 100_000 + k))
        del drawn["captions"]  # worded anew each time
        drawn["pictures"] = (drawn["pictures"] * 255).round().byte()
        drawn["masks"] = (F.adaptive_avg_pool2d(drawn["masks"], LATENT) * 255).round().byte()
        keep(path, drawn)


def keep(path: Path, tensors: dict[str, torch.Tensor]):
    """Write tensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, part)
    part.replace(path)


def load(folder: Path, shards: int, without=()) -> dict[str, torch.Tensor]:
    """All shards' tensors, one after the other, but for those named in `without`."""
    parts = []
    for k in range(shards):
        with safe_open(folder / f"{k:03}.safetensors", "pt") as file:
            parts.append({name: file.get_tensor(name) for name in file.keys() if name not in without})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def captions(data: dict[str, torch.Tensor], rows: torch.Tensor, generator) -> list[str]:
    """Training captions of some rows, worded anew."""
    pick = {name: data[name][rows] for name in
            ("superclass", "identity", "context", "second_superclass", "second_identity")}
    return world.captions(pick["superclass"], pick["identity"], pick["context"],
                          (pick["second_superclass"], pick["second_identity"]), generator)
