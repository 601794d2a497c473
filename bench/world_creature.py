"""The creatures of the world (see world.py): twelve factors, and how they are drawn."""

import torch

from .world_paint import (
    AMBER,
    BLACK,
    BRIGHT,
    COLOURS,
    CREAM,
    DEEP,
    WHITE,
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
    turn,
    wheel,
)

FACTORS = (
    Factor("hue", "colour", "circular", words=COLOURS, adjective=True),
    Factor("second hue", "colour", "circular"),
    Factor("head", "shape", "continuous"),  # from tall to wide
    Factor("ears", "shape", "categorical", 4, ("round ears", "pointed ears", "long ears", "floppy ears")),
    Factor("ear size", "shape", "continuous"),
    Factor("eyes", "shape", "categorical", 3, ("one eye", "two eyes", "three eyes")),
    Factor("eye size", "shape", "continuous"),
    Factor("mouth", "shape", "categorical", 4, ("a smile", "a beak", "a muzzle", "a trunk")),
    Factor("tail", "shape", "categorical", 4, ("a round tail", "a thin tail", "a bushy tail", "a fan tail")),
    Factor("legs", "shape", "categorical", 4, ("short legs", "long legs", "four legs", "no legs")),
    Factor("pattern", "pattern", "categorical", 5, ("plain", "striped", "spotted", "dipped", "masked"), True),
    Factor("pattern size", "pattern", "continuous"),
)
SHORT, LONG, FOUR, NONE = range(4)
CHIN = .12


def head(f):
    """Half width, half height and the middle's y of the head."""
    wide = between(f["head"], .80, 1.26)
    return .51 * wide, .51 / wide, CHIN - .51 / wide


def anchors(f):
    """Where things go: (x, y) of the top, the half width of the top, (y, half width) of the neck."""
    a, b, middle = head(f)
    zero = torch.zeros_like(a)
    return (zero, middle - b + .05, zero + .34), (zero, zero + CHIN + .02, zero + .34)


def marks(paint, x, y, f):
    """Where the second colour lies on the head and on the body, 0 to 1."""
    _, b, middle = head(f)
    t = f["pattern size"]
    kinds = (
        lambda x, y, t, m: ellipse(x, y - .62, between(t, .16, .42), between(t, .20, .48)),
        lambda x, y, t, m: fold(y - .07, between(t, .23, .58)).abs() - between(t, .05, .145),
        lambda x, y, t, m: spots(x, y - .05, between(t, .27, .60)),
        lambda x, y, t, m: between(t, .42, -.16) - y + .04 * torch.cos(x * 14),
        lambda x, y, t, m: ellipse(x, y - m, .62 + 0 * t, between(t, .14, .34)),
    )
    return paint.soft(choose(f["pattern"], kinds, x, y, t, middle))


def spots(x, y, period):
    """Big spots on a lattice of equal triangles."""
    step = period * 3 ** .5
    one = circle(fold(x, period), fold(y, step), 0)
    return torch.minimum(one, circle(fold(x - period / 2, period), fold(y - step / 2, step), 0)) - .30 * period


def draw(paint, x, y, side, f):
    """Paint creatures onto a layer. side (m, 1, 1): 1 where the tail is on the right, else -1."""
    body, second = wheel(f["hue"], BRIGHT), wheel(f["second hue"], DEEP)
    a, b, middle = head(f)
    mirrored, pattern, deeper = x.abs(), marks(paint, x, y, f), body * .72
    face(paint, x, y, mirrored, f, deeper)

    size = f["ear size"]
    d, inner, behind = ears(mirrored, y, size, a, b, middle, f["ears"])
    floppy = torch.where(f["ears"] == 3, 0., 9.)  # floppy ears hang before the head, the others stand behind it
    paint.put(d + floppy, deeper)
    paint.put(ellipse(x, y - middle, a, b), body, second, pattern)
    paint.put(inner + behind, second, outline=False)
    paint.put(d + behind, body)

    trunk, legs, feet = limbs(x, mirrored, y, f["legs"])
    paint.put(feet, second)
    paint.put(trunk, body, second, pattern)
    paint.put(legs, deeper)
    d, tip = tail(x * side, y, f)
    paint.put(d, body, second, paint.soft(tip))


def face(paint, x, y, mirrored, f, deeper):
    _, b, middle = head(f)
    r, count = between(f["eye size"], .10, .19), f["eyes"]
    pair, lone = torch.where(count > 0, 0., 9.), torch.where(count == 1, 9., 0.)
    r = torch.where(count == 0, 1.3 * r, r)
    apart, up = .06 + r, middle - .12 * b
    third = up - torch.where(count == 2, 1.75 * r, 0.)
    eye = any_of(circle(mirrored - apart, y - up, r) + pair, circle(x, y - third, r) + lone)
    glint = any_of(circle(mirrored - apart + .2 * r, y - up + .28 * r, .2 * r) + pair,
                   circle(x + .2 * r, y - third + .28 * r, .2 * r) + lone)
    paint.put(glint, WHITE, outline=False)
    paint.put(eye + .38 * r, BLACK, outline=False)
    paint.put(eye, WHITE, rim=.05)

    low, kind = middle + .52 * b, f["mouth"]
    far = torch.full_like(x, 9.)
    nose = choose(kind, (
        lambda x, y, low, far: torch.maximum(ellipse(x, y - low + .06, .20, .20), low - .04 - y),
        lambda x, y, low, far: far,
        lambda x, y, low, far: ellipse(x, y - low + .05, .085, .06),
        lambda x, y, low, far: far), x, y, low, far)
    paint.put(nose, torch.where(kind == 0, torch.tensor((.55, .10, .16)), BLACK)[:, 0], outline=False)
    beak = choose(kind, (
        lambda x, y, low, far: far,
        lambda x, y, low, far: any_of(triangle(x, y - low, .24, .18), triangle(x, low - y, .24, .28)),
        lambda x, y, low, far: ellipse(x, y - low - .03, .26, .18),
        lambda x, y, low, far: far), x, y, low, far)
    lower = (kind == 1) * paint.soft(low - y)  # or a yellow creature would hide its beak
    paint.put(beak, torch.where(kind == 1, AMBER, CREAM)[:, 0], AMBER * .62, lower)
    hose = choose(kind, (
        lambda x, y, low, far: far, lambda x, y, low, far: far, lambda x, y, low, far: far,
        lambda x, y, low, far: any_of(segment(x, y, 0., low, 0., .52, .105), segment(x, y, 0., .52, .17, .58, .105))),
        x, y, low, far)
    paint.put(hose, deeper)


def ears(x, y, size, a, b, middle, kind):
    """The ears, what is inside them, and an offset that puts floppy ones away from behind the head."""
    top = middle - b

    def at(x, y, angle, *place):
        return turn(x - place[0], y - place[1], angle)

    def round_(x, y, s, a, b, m, t):
        return circle(x - .80 * a, y - m + .72 * b, between(s, .13, .34))

    def pointed(x, y, s, a, b, m, t):
        return triangle(*at(x, y, .42, .57 * a, m - .55 * b), .15 + .10 * s, between(s, .30, .78)) - .03

    def long_(x, y, s, a, b, m, t):
        half = between(s, .19, .45)
        return ellipse(*at(x, y, .22, .46 * a + .2 * half, t + .10 - .75 * half), .125, half)

    def floppy(x, y, s, a, b, m, t):
        half = between(s, .20, .50)
        return ellipse(*at(x, y, -.38, .93 * a + .25 * half, m - .45 * b + .70 * half), .16, half)

    d = choose(kind, (round_, pointed, long_, floppy), x, y, size, a, b, middle, top)
    return d, d + .075, torch.where(kind == 3, 9., 0.)


def limbs(x, mirrored, y, kind):
    """The body, the legs and the feet."""
    body = choose(kind, (
        lambda x, y: ellipse(x, y - .46, .40, .42),
        lambda x, y: ellipse(x, y - .26, .33, .28),
        lambda x, y: box(x, y - .41, .70, .31, .28),
        lambda x, y: torch.maximum(ellipse(x, y - .98, .56, .98), y - .97)), x, y)
    legs = choose(kind, (
        lambda x, y: box(x - .20, y - .84, .11, .14),
        lambda x, y: box(x - .16, y - .68, .07, .28),
        lambda x, y: box((x - .36).abs() - .19, y - .80, .095, .18),
        lambda x, y: x + 9), mirrored, y)
    feet = choose(kind, (
        lambda x, y: ellipse(x - .23, y - .93, .19, .085),
        lambda x, y: ellipse(x - .20, y - .94, .17, .075),
        lambda x, y: ellipse((x - .37).abs() - .19, y - .94, .13, .075),
        lambda x, y: x + 9), mirrored, y)
    return body, legs, feet


def tail(x, y, f):
    """The tail to the right, and where it has the second colour."""
    reach = torch.where(f["legs"] == FOUR, .60, torch.where(f["legs"] == NONE, .40, .28))
    x = x - reach

    def thin(x, y):
        hook = torch.where(y > .42, circle(x - .10, y - .42, .26), torch.maximum((x - .36).abs(), -.02 - y)).abs()
        return torch.maximum(hook, -.16 - x) - .065

    def feathers(x, y):
        r, angle = circle(x, y - .66, 0), torch.atan2(x, .66 - y) - .72  # from straight up, to the right
        angle = angle - (angle / .62).round().clamp(-1, 1) * .62
        return r * angle.sin(), r * angle.cos()

    def fan(x, y):
        across, along = feathers(x, y)
        return ellipse(across, along - .42, .17, .42)

    d = choose(f["tail"], (
        lambda x, y: circle(x - .17, y - .60, .23),
        thin,
        lambda x, y: ellipse(*turn(x - .30, y - .40, .55), .22, .50),
        fan), x, y)
    tip = choose(f["tail"], (
        lambda x, y: circle(x - .20, y - .60, .4),
        lambda x, y: y - .14,
        lambda x, y: y - .22 + .3 * (x - .3),
        lambda x, y: .50 - circle(x, y - .66, 0)), x, y)
    return d, tip
