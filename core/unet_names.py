"""The names that a UNet's attention has: diffusers' become ComfyUI's, which this pack's files use.

ComfyUI counts through all blocks: conv_in, then a level's layers and what halves it, or its one layer more.
"""

import re

NAME = re.compile(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.(.+)")


def comfy_name(name: str, layers: int) -> str:
    """`down_blocks.1.attentions.0.transformer_blocks.…` of a UNet with `layers` in a block of the way down as
    `input_blocks.4.1.transformer_blocks.…` (SD1.5 has 2)."""
    side, level, layer, rest = NAME.fullmatch(name).groups()
    k = (layers + 1) * int(level or 0) + int(layer)
    place = {"down": f"input_blocks.{k + 1}", "mid": "middle_block", "up": f"output_blocks.{k}"}[side]
    return f"{place}.1.{rest}"
