"""What stands around the subjects of the world (see world.py): backgrounds, and things that are worn or held."""

import functools
import math

import torch
import torch.nn.functional as F

from .world_paint import (
    AMBER,
    BLACK,
    CLAY,
    FADED,
    INK,
    INKED,
    PAPER,
    PASTEL,
    SIZE,
    STYLES,
    WHITE,
    any_of,
    box,
    circle,
    ellipse,
    fold,
    segment,
    triangle,
)

SHIFTS = 8  # a background is as wide as the picture and its ends meet: it may be rolled to start anywhere
RED, PINK, PALE, GREEN, WOOD = (torch.tensor(c) for c in (
    (.86, .16, .20), (.93, .22, .55), (1., .80, .88), (.10, .52, .36), (.45, .29, .17)))


def rgb(*colours):
    return [torch.tensor([int(c[i:i + 2], 16) / 255 for i in (0, 2, 4)]) for c in colours]


def soft(d):
    return (.5 - d).clamp(0, 1)


class Backdrop:
    """A background painted from the back to the front, in pixels, its left end going on from its right one."""

    def __init__(self, sky, low=None):
        self.y, self.x = torch.meshgrid(torch.arange(SIZE) + .5, torch.arange(SIZE) + .5, indexing="ij")
        t = self.y / SIZE
        self.picture = torch.lerp(sky[:, None, None], (sky if low is None else low)[:, None, None], t)

    def put(self, d, colour):
        self.picture = torch.lerp(self.picture, colour[:, None, None], soft(d))
        return self

    def ground(self, y, colour, height=0., waves=1, start=0.):
        return self.put(y + height * torch.cos(2 * math.pi * waves * self.x / SIZE + start) - self.y, colour)

    def each(self, shape, places, colour):
        """A shape of (x, y, *more) at each of the places (x, y, *more)."""
        for x, y, *more in places:
            self.put(shape(fold(self.x - x, SIZE), self.y - y, *more), colour)
        return self


def studio():
    wall, floor = rgb("e9e4dc", "cfc6ba")
    return Backdrop(wall).ground(92, floor)


def meadow():
    sky, pale, hill, grass, cloud = rgb("8fd0f2", "cdeefc", "cbe6a0", "acd483", "ffffff")
    b = Backdrop(sky, pale).each(ellipse, ((30, 26, 20, 8), (38, 20, 11, 9), (98, 42, 18, 7), (91, 37, 10, 8)), cloud)
    return b.ground(82, hill, 9, 1, 1.).ground(96, grass, 4, 2)


def beach():
    sky, pale, sea, sand, foam, sun = rgb("9bdcf6", "e2f6fb", "2f9fc9", "f3dfa8", "f6fbff", "ffd75e")
    return (Backdrop(sky, pale).each(circle, ((100, 24, 13),), sun).ground(58, sea)
            .ground(84, foam, 3, 2).ground(88, sand, 3, 2))


def night():
    sky, low, moon, star, ground = rgb("141a3c", "2c3568", "f8efc4", "fff6c8", "1b2346")
    stars = ((12, 18, 2.4), (34, 44, 2), (52, 14, 2.6), (70, 34, 2), (121, 60, 2.2), (16, 68, 2), (78, 62, 2.4))
    return Backdrop(sky, low).each(circle, stars, star).each(circle, ((100, 26, 14),), moon).ground(98, ground, 5)


def forest():
    sky, low, far, near, ground = rgb("bfe0b8", "8fc09a", "4d8f62", "2c6a48", "5b5a34")
    b = Backdrop(sky, low).each(triangle, ((0, 96, 22, 70), (43, 96, 24, 84), (86, 96, 22, 74)), far)
    return b.each(triangle, ((22, 104, 20, 62), (64, 104, 22, 70), (106, 104, 21, 58)), near).ground(100, ground, 3, 2)


def snow():
    sky, low, far, ground, flake = rgb("a9c0d8", "dbe6f0", "c3d3e4", "f7fafd", "ffffff")
    flakes = ((10, 14, 3), (32, 34, 3), (54, 10, 3), (72, 40, 3), (92, 18, 3), (116, 36, 3), (20, 58, 3))
    return Backdrop(sky, low).ground(80, far, 8).each(circle, flakes, flake).ground(94, ground, 5, 1, 2.)


def wall():
    mortar, brick, dark = rgb("d9c4ae", "b5583f", "9c4733")
    b = Backdrop(mortar)
    for row in range(8):
        places = [(32 * k + 16 * (row % 2) + 16, 16 * row + 8, 14.2, 6.4) for k in range(4)]
        b.each(box, places, brick if row % 2 else dark)
    return b


def desert():
    sky, low, sun, far, near = rgb("fbb967", "fde3ae", "fff6d8", "d98a4a", "c06f38")
    b = Backdrop(sky, low).each(circle, ((34, 34, 15),), sun)
    return b.ground(84, far, 10, 1, .6).ground(100, near, 6, 1, 3.2)


def stage():
    curtain, fold_, floor, edge = rgb("b3202e", "9a1828", "8a5a34", "6b4326")
    b = Backdrop(curtain)
    b.put(fold(b.x - 8, 32).abs() - 7, fold_)
    return b.ground(94, edge).ground(97, floor)


def sea():
    top, low, sand, bubble, weed = rgb("2f85a6", "144a76", "c9b683", "8fd0de", "1a6a5c")
    bubbles = ((14, 30, 5), (22, 52, 3.5), (60, 18, 4), (92, 40, 6), (104, 22, 3.5), (118, 62, 4))
    b = Backdrop(top, low).each(circle, bubbles, bubble)
    return b.each(ellipse, ((4, 92, 5, 26), (16, 96, 4, 18), (80, 92, 5, 24)), weed).ground(104, sand, 4, 1, 1.)


BACKGROUNDS = studio, meadow, beach, night, forest, snow, wall, desert, stage, sea


@functools.cache
def backdrops():
    """Every background in every style, (styles, backgrounds, 3, H, W)."""
    flat = torch.stack([paint().picture for paint in BACKGROUNDS])
    pictures = flat.repeat(len(STYLES), 1, 1, 1, 1)
    down = torch.diff(flat, dim=2, prepend=flat[:, :, :1])
    step = ((flat - flat.roll(1, 3)).abs() + down.abs()).sum(1, keepdim=True)
    line = (step / .16 - .5).clamp(0, 1)
    pictures[INKED] = torch.lerp(torch.lerp(flat, torch.ones(()), .35), INK[:, None, None], .8 * line)
    pictures[PASTEL] = torch.lerp(PAPER[:, None, None], flat, FADED)
    blurred = flat
    for _ in range(3):
        wide = F.pad(F.pad(blurred, (3, 3, 0, 0), mode="circular"), (0, 0, 3, 3), mode="replicate")
        blurred = F.avg_pool2d(wide, 7, 1)
    y = (torch.arange(SIZE) + .5) / SIZE
    pictures[CLAY] = blurred * (1.08 - .42 * (2 * y - .7).square().clamp(max=1))[:, None]
    return pictures.clamp(0, 1)


def background(kind, style, shift):
    """Backgrounds (m, 3, H, W) of kinds, styles and shifts (m,)."""
    columns = (torch.arange(SIZE) + SIZE // SHIFTS * shift[:, None]) % SIZE
    return backdrops()[style, kind].gather(3, columns[:, None, None].expand(-1, 3, SIZE, -1))


def hat(paint, x, y, top, neck, side):
    at, y = (x - top[0]) / top[2], (y - top[1]) / top[2]
    d = top[2] * any_of(box(at, y + .12, 1.25, .13, .1), box(at, y + .66, .78, .60, .1))
    paint.put(d, BLACK.expand(len(x), 3) * 1.6, RED, paint.soft(top[2] * box(at, y + .42, 2., .17)))


def crown(paint, x, y, top, neck, side):
    at, y = (x - top[0]) / top[2], (y - top[1]) / top[2]
    jewel = top[2] * circle(fold(at, .62), y + .22, .14)
    points = triangle(fold(at, .62), y + .3, .31, .85)
    d = top[2] * any_of(box(at, y + .2, .93, .27), torch.maximum(points, at.abs() - .93))
    paint.put(d, AMBER * torch.tensor((1., 1.1, .9)), RED, paint.soft(jewel))


def scarf(paint, x, y, top, neck, side):
    at, y, half = x - neck[0], y - neck[1], neck[2]
    stripes = paint.soft(fold(y, .19).abs() - .045)
    paint.put(box(at + side * .5 * half, y - .24, .10, .25, .03), RED, WHITE, stripes)
    paint.put(box(at, y, half + .06, .11, .10), RED)


def balloon(paint, x, y, top, neck, side):
    at = x * side - .80
    paint.put(ellipse(at + .09, y + .68, .055, .085), PALE, outline=False)
    paint.put(any_of(ellipse(at, y + .55, .27, .33), triangle(at, y + .18, .07, .1)), PINK)
    paint.put(segment(at, y, 0., -.2, -.30, .52, .018), INK, outline=False)


def flag(paint, x, y, top, neck, side):
    at = x * side - .62
    cloth = box(at - .25, y + .42 + .04 * torch.sin(9 * at), .25, .20)
    paint.put(cloth, WHITE, GREEN, paint.soft(circle(at - .26, y + .42, .12)))
    paint.put(box(at, y - .15, .03, .80), WOOD)


THINGS = hat, crown, scarf, balloon, flag
