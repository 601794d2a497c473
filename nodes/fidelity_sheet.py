"""A fidelity curve as a picture: what was drawn at each strength, a row for each prompt, and the curve below."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core.fidelity import KEPT, Curve
from .watch import to_pil

CELL, GAP, LINE = 192, 6, 22  # pixels of a picture's longer side, between pictures, and of a line of text
CHART = 220
LIKENESS, OBEDIENCE = "#e08a1e", "#3d9bd6"  # as in web/fidelity.mjs


def nearest(curve: Curve) -> int:
    """The place of the strength that was drawn nearest to the knee."""
    return min(range(1, len(curve.strengths)), key=lambda k: abs(curve.strengths[k] - curve.knee))


def sheet(curve: Curve, pictures: Tensor) -> Tensor:
    """The sheet (1, H, W, 3) of a curve and its pictures (s, p, H, W, 3); those nearest to the knee are framed."""
    font, columns, rows = ImageFont.load_default(14), len(curve.strengths), len(curve.prompts)
    scale = CELL / max(pictures.shape[2:4])
    height, width = (round(side * scale) for side in pictures.shape[2:4])
    step = width + GAP
    across = max(columns * step + GAP, 2 * CELL)
    whole = Image.new("RGB", (across, LINE + rows * (height + LINE + GAP) + CHART), "#202020")
    draw = ImageDraw.Draw(whole)
    for column, strength in enumerate(curve.strengths):
        at_knee = column == nearest(curve)
        draw.text((GAP + column * step + width / 2, LINE / 2), f"{strength:g}", LIKENESS if at_knee else "white", font,
                  "mm")
        for row in range(rows):
            picture = to_pil(pictures[column, row : row + 1]).resize((width, height), Image.Resampling.LANCZOS)
            x, y = GAP + column * step, LINE + row * (height + LINE + GAP)
            whole.paste(picture, (x, y))
            if at_knee:
                draw.rectangle((x - 2, y - 2, x + width + 1, y + height + 1), None, LIKENESS, 2)
    for row, prompt in enumerate(curve.prompts):
        draw.text((GAP, LINE + row * (height + LINE + GAP) + height + 3), prompt, "#b0b0b0", font)
    whole.paste(chart(curve, across), (0, whole.height - CHART))
    return torch.from_numpy(np.asarray(whole).astype(np.float32) / 255)[None]


def chart(curve: Curve, width: int) -> Image.Image:
    """Likeness and obedience over strength, and the knee."""
    picture, font = Image.new("RGB", (width, CHART), "#202020"), ImageFont.load_default(14)
    draw = ImageDraw.Draw(picture)
    low = min(0.0, *curve.likeness, *curve.obedience)
    high = max(1.0, *curve.likeness, *curve.obedience)

    def at(s, value):
        return 40 + (width - 60) * s, 38 + (CHART - 66) * (high - value) / (high - low)

    for value in (0, 1):
        draw.line([at(0, value), at(1, value)], "#505050")
        draw.text((at(0, value)[0] - 8, at(0, value)[1]), f"{value}", "#b0b0b0", font, "rm")
    for k in range(0, 100, 2):  # dashes
        draw.line([at(k / 100, KEPT), at((k + 1) / 100, KEPT)], OBEDIENCE)
    draw.line([at(curve.knee, low), at(curve.knee, high)], "white")
    for values, colour in ((curve.likeness, LIKENESS), (curve.obedience, OBEDIENCE)):
        points = [at(*point) for point in zip(curve.strengths, values)]
        draw.line(points, colour, 3)
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
    for s in curve.strengths:
        draw.text((at(s, low)[0], CHART - 14), f"{s:g}", "#b0b0b0", font, "mm")
    draw.text((40, 8), "likeness", LIKENESS, font)
    draw.text((120, 8), "obedience to the prompt", OBEDIENCE, font)
    draw.text((width - 20, 8), f"strength {curve.knee:g}", "white", font, "ra")
    return picture
