"""The brush of the world (see world.py): signed distances, two colour wheels, and layers painted front to back.

Letters: m pictures, H = W = SIZE pixels; x, y (m, H, W) a subject's own coordinates, y downwards, the ground at y = 1;
d a signed distance in the same unit, below 0 inside; u (m, 1, 1) pixels per unit.
"""

from dataclasses import dataclass

import torch

SIZE = 128
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
BRIGHT, DEEP = (torch.tensor([[int(c[i:i + 2], 16) / 255 for i in (0, 2, 4)] for c in wheel.split()]) for wheel in (
    "e5484d f58f3c f7d04f 66bf5e 43bdb8 4f94ea 9c6edc f08abc",
    "861c2c 98480e 8a6a0a 1d6a36 0d6068 1d3f90 482688 962a68"))
INK, WHITE, BLACK, CREAM, AMBER, GLASS, LEAF = (torch.tensor(c) for c in (
    (.13, .11, .16), (1., 1., 1.), (.10, .09, .13), (.99, .94, .84), (.98, .70, .16), (.20, .28, .42), (.14, .38, .17)))
PAPER = torch.tensor((.99, .97, .94))
FADED = .58  # how much colour pastel keeps
STYLES = FLAT, INKED, PASTEL, CLAY = range(4)
BINS = {"circular": len(COLOURS), "continuous": 3}


@dataclass(frozen=True)
class Factor:
    """A column of an identity tensor.

    kind: "circular" (a hue, 0 to 1 and round again), "continuous" (0 to 1, from small to large) or "categorical" (an
    integer below classes). words: the coarse word of every bin, if captions ever name it. adjective: it stands before
    the noun, and otherwise after "with".
    """
    name: str
    group: str  # colour, shape or pattern
    kind: str
    classes: int = 0
    words: tuple = ()
    adjective: bool = False

    def bin(self, value):
        """The coarse bin of a value: of a hue the nearest named colour, of a length its third."""
        if self.kind == "categorical":
            return value.long()
        bins = BINS[self.kind]
        return (value * bins).round().long() % bins if self.kind == "circular" else (value * bins).long()

    @property
    def bins(self):
        return self.classes or BINS[self.kind]


def wheel(hue, colours):
    """The colour (m, 3) at a hue (m,) of a wheel of named colours."""
    place = hue.flatten() * len(colours)
    low = place.long()
    return torch.lerp(colours[low % len(colours)], colours[(low + 1) % len(colours)], (place - low)[:, None])


def between(t, low, high):
    return low + (high - low) * t


def circle(x, y, r):
    return (x * x + y * y).sqrt() - r


def ellipse(x, y, a, b):
    """Half axes a and b. Not the exact distance but, near the edge, to first order."""
    p, q = x / a, y / b
    k = (p * p + q * q).sqrt()
    return (k + 1e-3) * (k - 1) / (((p / a) ** 2 + (q / b) ** 2).sqrt() + 1e-3)


def box(x, y, a, b, r=0.):
    """Half sides a and b, corners rounded by r."""
    p, q = x.abs() - (a - r), y.abs() - (b - r)
    return (p.clamp_min(0) ** 2 + q.clamp_min(0) ** 2).sqrt() + torch.maximum(p, q).clamp_max(0) - r


def triangle(x, y, half, height):
    """From a base at y = 0, 2 half wide, up to a point at y = -height."""
    return torch.maximum(y, (x.abs() * height - y * half - half * height) / (half * half + height * height) ** .5)


def segment(x, y, x0, y0, x1, y1, r):
    p, q, dx, dy = x - x0, y - y0, x1 - x0, y1 - y0
    t = ((p * dx + q * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return ((p - t * dx) ** 2 + (q - t * dy) ** 2).sqrt() - r


def turn(x, y, angle):
    """x, y as seen by a part that is turned clockwise by an angle."""
    angle = torch.as_tensor(angle)
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def any_of(*distances):
    d = distances[0]
    for other in distances[1:]:
        d = torch.minimum(d, other)
    return d


def fold(x, period):
    """x measured from the nearest multiple of a period."""
    return x - (x / period).round() * period


def choose(kind, functions, *of):
    """The function that a class (m, 1, 1) names, of every row: each function runs on its own rows alone."""
    kind, out = kind.flatten(), torch.empty_like(of[0])
    for k, function in enumerate(functions):
        rows = kind == k
        if rows.any():
            out[rows] = function(*(t[rows] for t in of))
    return out


class Layer:
    """A picture with transparency, painted from the front to the back, so that each part only takes what is left.

    u, style: (m, 1, 1). left: (m, H, W), how much of every pixel is still bare.
    """

    def __init__(self, u, style):
        self.u, self.style = u, style
        self.left = torch.ones(len(u), SIZE, SIZE)
        self.ink = torch.where(style == INKED, between(u / 46, 1., 2.2), torch.tensor(0.))  # pixels
        self.weights, self.colours = [], []
        self.inked, self.clay = (style.flatten() == INKED).nonzero()[:, 0], (style.flatten() == CLAY).nonzero()[:, 0]
        self.dark = torch.zeros(len(self.clay), SIZE, SIZE)

    def soft(self, d):
        """Coverage 0 to 1 of a signed distance, its edge a pixel wide."""
        return (.5 - d * self.u).clamp_(0, 1)

    def put(self, d, colour, second=None, pattern=None, outline=True, rim=.16):
        """Paint where d < 0 in a colour (3) or (m, 3), and in the second one where the pattern is 1.

        rim: how far in from its edge a part of clay is shaded.
        """
        w = self.soft(d) * self.left
        self.left = self.left - w
        if len(self.clay) and outline:
            self.dark += w[self.clay] * (1 + d[self.clay] / rim).clamp_(0, 1)
        if pattern is not None:
            marked = w * pattern
            w = w - marked
            self._keep(marked, second)
        self._keep(w, colour)
        if outline and len(self.inked):
            rows, line = self.inked, torch.zeros_like(w)
            line[rows] = (.5 + self.ink[rows] - d[rows] * self.u[rows]).clamp_(0, 1) * self.left[rows]
            self.left = self.left - line
            self._keep(line, INK)

    def _keep(self, w, colour):
        self.weights.append(w)
        self.colours.append(colour.expand(len(w), 3))

    def finish(self):
        """What was painted, premultiplied (m, 3, H, W), and its coverage (m, 1, H, W)."""
        colours = torch.stack(self.colours, 1)
        colours = torch.where(self.style == PASTEL, torch.lerp(PAPER, colours, FADED), colours)
        weights = torch.stack(self.weights, 1).flatten(2)
        picture = (colours.transpose(1, 2) @ weights).unflatten(2, (SIZE, SIZE))
        if len(self.clay):
            picture[self.clay] = picture[self.clay] * (1.04 - .5 * self.dark[:, None] ** 2)
        return picture, 1 - self.left[:, None]
