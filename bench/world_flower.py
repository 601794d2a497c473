"""The flowers of the world (see world.py): twelve factors, and how they are drawn."""

import math

import torch

from .world_paint import (
    BRIGHT,
    COLOURS,
    DEEP,
    LEAF,
    Factor,
    any_of,
    between,
    choose,
    circle,
    ellipse,
    turn,
    wheel,
)

FACTORS = (
    Factor("hue", "colour", "circular", words=COLOURS, adjective=True),
    Factor("second hue", "colour", "circular"),  # of the centre and the pattern
    Factor("petals", "shape", "categorical", 3, ("round petals", "pointed petals", "heart petals")),
    Factor("petal number", "shape", "categorical", 3, ("four petals", "six petals", "nine petals")),
    Factor("petal length", "shape", "continuous"),
    Factor("petal width", "shape", "continuous"),
    Factor("centre size", "shape", "continuous"),
    Factor("lean", "shape", "continuous"),
    Factor("leaves", "shape", "categorical", 3, ("round leaves", "thin leaves", "four leaves")),
    Factor("leaf size", "shape", "continuous"),
    Factor("pattern", "pattern", "categorical", 4, ("ringed", "tipped", "striped", "spotted"), True),
    Factor("pattern size", "pattern", "continuous"),
)
MIDDLE = -.38
NUMBERS = torch.tensor((4., 6., 9.))


def length(f):
    return between(f["petal length"], .52, .80)


def lean(f, y):
    """How far the stem has bent to a side at a height."""
    return between(f["lean"], -.26, .26) * ((1 - y) / (1 - MIDDLE)) ** 2


def anchors(f):
    """Where things go: (x, y) of the top, the half width of the top, (y, half width) of the neck."""
    zero, y = torch.zeros_like(f["lean"]), MIDDLE + length(f) + .06
    return (lean(f, zero + MIDDLE), zero + MIDDLE + .10 - length(f), zero + .34), (lean(f, y), y, zero + .17)


def draw(paint, x, y, side, f):
    """Paint flowers onto a layer. side is of no use to them."""
    petal, second = wheel(f["hue"], BRIGHT), wheel(f["second hue"], DEEP)
    p, q = x - lean(f, torch.tensor(MIDDLE)), y - MIDDLE
    r = circle(p, q, 0)
    paint.put(r - between(f["centre size"], .13, .27), second * .64)  # darker: a ring may lie around it
    paint.put(*petals(paint, p, q, r, petal, second, f))
    bent = x - lean(f, y.clamp(MIDDLE, 1))
    paint.put(leaves(bent, y, f), LEAF * 1.3)
    paint.put(torch.maximum(bent.abs() - .06, torch.maximum(MIDDLE - y, y - 1)), LEAF)


def petals(paint, p, q, r, petal, second, f):
    number = NUMBERS[f["petal number"]]
    sector, angle = 2 * math.pi / number, torch.atan2(p, -q)
    angle = angle - (angle / sector).round() * sector
    across, along, end = r * angle.sin(), r * angle.cos(), length(f)
    wide = end * between(f["petal width"], .62, 1.) * (1.5 / number + .07)
    d = choose(f["petals"], (
        lambda a, o, e, w: ellipse(a, o - .52 * e, w, .48 * e),
        lambda a, o, e, w: circle(a.abs() + (.23 * e * e / w - .5 * w), o - .5 * e, .23 * e * e / w + .5 * w),
        lambda a, o, e, w: ellipse(*turn(a.abs() - .46 * w, o - .60 * e, -.9 * w / e), .60 * w, .40 * e)),
        across, along, end, wide)
    # (a, o): across a petal and outwards along it; e its length, w half its width
    t = f["pattern size"]
    pattern = choose(f["pattern"], (
        lambda a, o, r, e, w, t: r - e * between(t, .46, .74),
        lambda a, o, r, e, w, t: e * between(t, .84, .62) - r,
        lambda a, o, r, e, w, t: a.abs() - w * between(t, .18, .42),
        lambda a, o, r, e, w, t: circle(a, o - .68 * e, w * between(t, .40, .70))), across, along, r, end, wide, t)
    return d, petal, second, paint.soft(pattern)


def leaves(x, y, f):
    size = between(f["leaf size"], .7, 1.25)

    def leaf(x, y, s, low, angle, half, thin):
        reach = half * s
        p, q = turn(x.abs() - reach * math.cos(angle), y - low + reach * math.sin(angle), -angle)
        return ellipse(p, q, reach, thin * s)

    return choose(f["leaves"], (
        lambda x, y, s: leaf(x, y, s, .86, .50, .24, .13),
        lambda x, y, s: leaf(x, y, s, .96, .95, .36, .055),
        lambda x, y, s: any_of(leaf(x, y, s, .94, .35, .20, .08), leaf(x, y, s, .68, .55, .17, .07))), x, y, size)
