"""The houses of the world (see world.py): twelve factors, and how they are drawn."""

import torch

from .world_paint import (
    BRIGHT,
    COLOURS,
    CREAM,
    DEEP,
    GLASS,
    Factor,
    any_of,
    between,
    box,
    choose,
    circle,
    ellipse,
    fold,
    segment,
    triangle,
    wheel,
)

FACTORS = (
    Factor("hue", "colour", "circular", words=COLOURS, adjective=True),
    Factor("second hue", "colour", "circular"),  # of the roof, the door and the pattern
    Factor("width", "shape", "continuous"),
    Factor("roof", "shape", "categorical", 4, ("a pointed roof", "a castle roof", "a round roof", "a stepped roof")),
    Factor("roof height", "shape", "continuous"),
    Factor("windows", "shape", "categorical", 3, ("round windows", "square windows", "arched windows")),
    Factor("window number", "shape", "categorical", 3, ("one window", "two windows", "three windows")),
    Factor("window size", "shape", "continuous"),
    Factor("door", "shape", "categorical", 3),  # left, middle, right
    Factor("addition", "shape", "categorical", 3, ("no chimney", "a chimney", "a tower")),
    Factor("pattern", "pattern", "categorical", 4, ("striped", "spotted", "dipped", "crossed"), True),
    Factor("pattern size", "pattern", "continuous"),
)
EAVES = -.10


def anchors(f):
    """Where things go: (x, y) of the top, the half width of the top, (y, half width) of the neck."""
    zero = torch.zeros_like(f["width"])
    return (zero, EAVES + .08 - between(f["roof height"], .38, .80), zero + .34), (zero, zero + EAVES + .08, half(f))


def half(f):
    return between(f["width"], .46, .76)


def draw(paint, x, y, side, f):
    """Paint houses onto a layer. side (m, 1, 1): 1 where a tower is on the right, else -1."""
    wall, second = wheel(f["hue"], BRIGHT), wheel(f["second hue"], DEEP)
    w = half(f)
    paint.put(windows(x, y, w, f) + .045, GLASS, outline=False)
    paint.put(windows(x, y, w, f), CREAM)
    at = x - (f["door"] - 1) * (w - .22)
    door = arch(at, y - .72, .16, .28)
    paint.put(circle(at - .07, y - .76, .03), CREAM, outline=False)
    paint.put(door + .03, second * .8, outline=False)
    paint.put(door, CREAM)
    paint.put(roof(x, y, w, f), second)
    paint.put(box(x, y - (EAVES + 1) / 2, w, (1 - EAVES) / 2), wall, second, marks(paint, x, y, f))

    far, beside = torch.full_like(x, 9.), x * side - w
    height = between(f["roof height"], .38, .80)
    stack = choose(f["addition"], (
        lambda x, h, y, far: far, lambda x, h, y, far: box(x + .20, y - EAVES + .8 * h, .10, .30),
        lambda x, h, y, far: far), beside, height, y, far)
    paint.put(stack, wall * .62)
    hat = choose(f["addition"], (
        lambda x, y, far: far, lambda x, y, far: far,
        lambda x, y, far: triangle(x - .12, y + .42, .28, .50)), beside, y, far)
    keep = choose(f["addition"], (
        lambda x, y, far: far, lambda x, y, far: far,
        lambda x, y, far: box(x - .12, y - .29, .20, .71)), beside, y, far)
    paint.put(hat, second)
    paint.put(keep, wall * .8)


def arch(x, y, a, b):
    """A round-topped opening of half width a and half height b."""
    spring = y + b - a  # 0 where the round part begins
    return torch.where(spring < 0, circle(x, spring, a), torch.maximum(x.abs() - a, y - b))


def windows(x, y, w, f):
    number = f["window number"]
    r = between(f["window size"], .10, .165) * torch.where(number == 0, 1.25, 1.)
    step = torch.where(number == 0, 9., torch.where(number == 1, 1.05 * w, .64 * w))
    p = torch.where(number == 1, x.abs() - step / 2, x - (x / step).round().clamp(-1, 1) * step)
    return choose(f["windows"], (
        lambda p, q, r: circle(p, q, r), lambda p, q, r: box(p, q, r, r),
        lambda p, q, r: arch(p, q - .1 * r, .85 * r, 1.2 * r)), p, y - .20, r)


def roof(x, y, w, f):
    h = between(f["roof height"], .38, .80)
    return choose(f["roof"], (
        lambda x, y, w, h: triangle(x, y, w + .16, h),
        lambda x, y, w, h: any_of(box(x, y + .35 * h, w + .10, .35 * h),
                                  torch.maximum(fold(x, .5 * w).abs() - .14 * w, box(x, y + .5 * h, w + .10, .5 * h))),
        lambda x, y, w, h: torch.maximum(ellipse(x, y, w + .08, h), y),
        lambda x, y, w, h: any_of(box(x, y + h / 6, w + .12, h / 6), box(x, y + h / 3, .70 * w, h / 3),
                                  box(x, y + h / 2, .36 * w, h / 2))), x, y - EAVES, w, h)


def marks(paint, x, y, f):
    """Where the second colour lies on the wall, 0 to 1."""
    t = f["pattern size"]

    def spots(x, y, t, w):
        period = between(t, .32, .54)
        return circle(fold(x, period), fold(y - .42, period), .27 * period)

    def crossed(x, y, t, w):
        r = between(t, .035, .085)
        beams = any_of(segment(x.abs(), y, 0. * w, .45, w, EAVES, r), segment(x.abs(), y, 0. * w, .45, w, 1., r))
        return any_of(beams, (w - x.abs()) - 1.4 * r, (1 - y).abs() - 1.4 * r)

    return paint.soft(choose(f["pattern"], (
        lambda x, y, t, w: fold(y - .44, between(t, .22, .42)).abs() - between(t, .05, .10), spots,
        lambda x, y, t, w: between(t, .76, .30) - y, crossed), x, y, t, half(f)))
