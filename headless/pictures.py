"""Pictures in and out of files, as tensors (1, H, W, 3) in 0..1."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from core.file import brief
from core.file import write as keep


def read(file, name: str = "") -> torch.Tensor:
    """The picture of a path, or of an open file of this name, turned as its camera was held. Raises ValueError for what
    cannot be learnt from, and OSError where there is nothing to open."""
    name = name or str(file)
    try:
        picture = ImageOps.exif_transpose(Image.open(file))
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what damaged pictures raise
        if getattr(error, "errno", None):
            raise
        said = "" if isinstance(error, UnidentifiedImageError) else f" ({brief(error)})"
        raise ValueError(f"'{name}' is not a picture that can be read{said}. Give a PNG, a JPEG or a WebP of usual "
                         "size.") from error
    if picture.mode.startswith(("I", "F")) or "A" in picture.getbands():
        raise ValueError(f"'{name}' is a picture of mode {picture.mode}, and one of eight bits without transparency is "
                         "needed. Put what was cut out on a background, or save it as a JPEG.")
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def write(path, picture: torch.Tensor) -> Path:
    """Write a picture as PNG, whole or not at all."""
    return put(path, image(picture))


def image(picture: torch.Tensor) -> Image.Image:
    """The first of pictures (m, H, W, 3) as Pillow has it."""
    return Image.fromarray((picture[0].clamp(0, 1) * 255).round().byte().cpu().numpy())


def put(path, picture: Image.Image) -> Path:
    """Write Pillow's picture as PNG, whole or not at all."""
    data, path = io.BytesIO(), Path(path)
    picture.save(data, "PNG")
    keep(path, data.getvalue())
    return path


def sheet(rows: list[list[torch.Tensor]], above: list[str], beside: list[str], side: int = 192) -> Image.Image:
    """A table of pictures: a line of text above each column, one under each row."""
    font, line = ImageFont.load_default(14), 22
    paper = Image.new("RGB", (len(above) * (side + 4), line + len(rows) * (side + line)), "white")
    pen = ImageDraw.Draw(paper)
    for k, text in enumerate(above):
        pen.text((k * (side + 4) + 4, 3), text, "black", font)
    for n, (row, text) in enumerate(zip(rows, beside)):
        top = line + n * (side + line)
        for k, picture in enumerate(row):
            paper.paste(ImageOps.fit(image(picture), (side, side)), (k * (side + 4), top))
        pen.text((4, top + side + 2), text, "black", font)
    return paper
