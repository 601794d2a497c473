"""The pack's sign for the Comfy registry: an icon and a banner, of what the demo makes of one picture.

The registry wants an icon that is square, of 400 pixels at most, and a banner of 21:9. Both show what the model that
comes with the pack really draws: a creature that it never saw, learnt from one picture as in `make demo`.
"""

import argparse

import torch
from PIL import Image, ImageDraw, ImageFont

from ..core import concept as concepts
from ..core import host_diffusers
from ..core import tune as tuning
from ..headless import demo, pictures
from ..headless.comfy import ROOT
from ..headless.learn import DEMO

FOLDER = ROOT / "pictures"
ICON, BANNER = (400, 400), (1260, 540)
PAPER, INK, FAINT, KEY = "#16181d", "#f4f1ea", "#a9adb6", "#f0a030"
NAME, PROMISE = "Perfusion Concepts", "One picture becomes a word, and a dial between likeness and prompt."
DRAWN = ((0, 1), (1, 1), (3, 1))  # a prompt of the demo's, and the strength
DIAL = (0, 0.5, 0.75, 1)


def learn():
    """The picture (1, H, W, 3), and what draws a prompt of the demo's at a strength."""
    photo, pipe = pictures.read(DEMO / "pictures" / "mimi.png"), host_diffusers.load(DEMO)
    host = host_diffusers.DiffusersHost(pipe, demo.SUPERCLASS, DEMO)
    learnt = tuning.tune(host, photo, demo.SUPERCLASS, demo.WORD, tuning.Tuning(resolution=128),
                         keep=lambda concept: "")
    learnt = concepts.parse(concepts.dump(learnt), demo.WORD)

    def draw(prompt, strength):
        text = demo.PROMPTS[prompt].format(demo.WORD)
        return host_diffusers.pictures(pipe, [text], [learnt.at(strength)], seeds=[prompt])

    return photo, draw


def tile(picture: torch.Tensor, side: int, edge: str = PAPER, width: int = 0) -> Image.Image:
    """A picture (1, H, W, 3) as a square with round corners and an edge."""
    over = 4  # drawn larger, so that the corner is smooth
    mask = Image.new("L", (side * over,) * 2)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side * over - 1, side * over - 1), side * over // 10, 255)
    square = Image.new("RGBA", (side, side), edge)
    inner = side - 2 * width
    square.paste(pictures.image(picture).resize((inner, inner), Image.Resampling.LANCZOS), (width, width))
    square.putalpha(mask.resize((side, side), Image.Resampling.LANCZOS))
    return square


def icon(photo, others) -> Image.Image:
    """The picture with an edge, and three that were made of it."""
    paper, gap = Image.new("RGBA", ICON), 8
    side = (ICON[0] - gap) // 2
    for k, picture in enumerate([photo, *others]):
        square = tile(picture, side, KEY, 10 * (k == 0))
        paper.alpha_composite(square, (k % 2 * (side + gap), k // 2 * (side + gap)))
    return paper


def banner(photo, along) -> Image.Image:
    """The picture, then one prompt as the dial goes up."""
    paper = Image.new("RGBA", BANNER, PAPER)
    pen, side, gap, top, left = ImageDraw.Draw(paper), 208, 22, 210, 54
    pen.text((left, 42), NAME, INK, ImageFont.load_default(68))
    pen.text((left + 3, 130), PROMISE, FAINT, ImageFont.load_default(29))
    paper.alpha_composite(tile(photo, side, KEY, 8), (left, top))
    first = left + side + 2 * gap
    for k, picture in enumerate(along):
        paper.alpha_composite(tile(picture, side), (first + k * (side + gap), top))
    line, last = top + side + 52, first + len(along) * (side + gap) - gap
    pen.text((left, line - 18), demo.WORD, KEY, ImageFont.load_default(34))
    pen.rounded_rectangle((first, line, last, line + 6), 3, "#3b3f49")
    for k, strength in enumerate(DIAL):
        x = first + k * (side + gap) + side // 2
        pen.ellipse((x - 9, line - 6, x + 9, line + 12), KEY)
        pen.text((x, line + 22), f"{strength:g}", FAINT, ImageFont.load_default(20), anchor="ma")
    return paper.convert("RGB")


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    photo, draw = learn()
    print(pictures.put(FOLDER / "icon.png", icon(photo, [draw(*of) for of in DRAWN])))
    print(pictures.put(FOLDER / "banner.png", banner(photo, [draw(1, strength) for strength in DIAL])))
