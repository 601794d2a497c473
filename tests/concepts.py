"""Concepts as learning gives them, of every base's shapes and of a creature's small ones."""

import hashlib
import json
import struct

import torch

from perfusion.core.concept import Concept
from perfusion.core.key_lock import direction

SD15 = {f"input_blocks.{n}.1.transformer_blocks.0": 320 * 2**k for k, pair in enumerate([(1, 2), (4, 5), (7, 8)])
        for n in pair}
SD15 |= {"middle_block.1.transformer_blocks.0": 1280}
SD15 |= {f"output_blocks.{n}.1.transformer_blocks.0": 1280 // 2**k for k, three in
         enumerate([(3, 4, 5), (6, 7, 8), (9, 10, 11)]) for n in three}
DEPTHS = {"input_blocks.4.1": (640, 2), "input_blocks.5.1": (640, 2), "input_blocks.7.1": (1280, 10),
          "input_blocks.8.1": (1280, 10), "middle_block.1": (1280, 10)}
DEPTHS |= {f"output_blocks.{n}.1": (1280, 10) if n < 3 else (640, 2) for n in range(6)}
SDXL = {f"{name}.transformer_blocks.{n}": width for name, (width, depth) in DEPTHS.items() for n in range(depth)}
SHAPES = {  # base -> value projections, width of text, widths of word embeddings, largest file in bytes
    "sd1": (SD15, 768, {"clip_l": 768}, 40 * 1024),
    "sd2": (SD15, 1024, {"clip_h": 1024}, 40 * 1024),
    "sdxl": (SDXL, 2048, {"clip_l": 768, "clip_g": 1280}, 200 * 1024),
    "creature": ({"input_blocks.1.1.transformer_blocks.0": 24}, 16, {"clip_l": 16}, 4 * 1024),
}

OUTPUT = "target_output.input_blocks.1.1.transformer_blocks.0.attn2.to_v"
NAMES = ["embedding.clip_l", "target_input", "key_input", "direction", OUTPUT]


def learnt(base="creature", **changes) -> Concept:
    """A concept with a base's shapes and values like those that learning gives."""
    blocks, d, widths, _ = SHAPES[base]
    r = torch.Generator().manual_seed(0)
    i = torch.randn(d, generator=r)
    spectrum = torch.rand(d, generator=r, dtype=torch.float64) * 30 + 1
    toward, energy = direction(torch.diag(1 / spectrum), i)
    return Concept(**{
        "base": base,
        "superclass": "cat",
        "word": "<mimi>",
        "embedding": {name: 0.02 * torch.randn(width, generator=r) for name, width in widths.items()},
        "target_input": i,
        "key_input": torch.randn(d, generator=r),
        "direction": toward.float(),
        "target_output": {f"{name}.attn2.to_v": torch.randn(width, generator=r) for name, width in blocks.items()},
        "energy": energy,
        "covariance": hashlib.sha256(b"captions").hexdigest(),
        "training": {"steps": 5, "seed": 7, "learning_rate": 0.03, "captions": ["a photo of <mimi>", "猫の写真"]},
    } | changes)


def metadata_of(data: bytes) -> dict:
    return json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
