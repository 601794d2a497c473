"""What the bench measures on pictures, all read from them by the network of reader.py, with ceilings and floors.

**identity**: take a value at random from what the reader believes of a factor and one from the other side; the score is
1 − E(difference²) / (2 var), where 2 var is what two random members differ by. So an exact reading scores 1, a random
other member 0, and a picture that tells nothing also 0: the mean is not rewarded. A hue's difference is the chord's on
the circle; that of classes is whether they differ, so a class scores 1 − (1 − p) / (1 − 1/classes), p the belief in the
right one. `guess=True` scores the mean belief instead: 1 − MSE / (2 var) to the letter, where a picture that tells
nothing scores about .5 and no more than that should be read into one.

No score of identity says much without **top1** (is the right member the nearest of 64?) and without **alignment** (the
share of named context columns that are as wanted), which copying the training picture cannot reach.

Letters: m pictures, f = 12 factors, e belief columns (reader.embed), c = 7 context columns, q = 6 named ones.
"""

import torch

from . import degrade, world
from . import reader as judge

GALLERY = 64
COLUMNS = [world.CONTEXT[k].name for k in judge.NAMED]
PLACE, COMPANY = judge.NAMED.index(world.PLACE), judge.NAMED.index(world.COMPANY)
CHANGES = {
    "clean": lambda pictures: pictures,
    "blurred": lambda pictures: degrade.blurred(pictures, 1.),
    "JPEG": lambda pictures: degrade.jpeg(pictures, 50),
}


# ---- identity

def scores(superclass, believed, true, guess=False):
    """The score of every factor (m, f) of beliefs (…, e) against beliefs or embedded truths (…, e); a random pair has 0
    on average, an exact one 1. Both sides broadcast. guess: score the mean belief of the first (see above)."""
    out = []
    for factor, (at, end) in zip(world.FACTORS[superclass], judge.SPANS[superclass]):
        a, b = believed[..., at:end], true[..., at:end]
        if factor.kind == "continuous":
            square, doubt = a[..., 1] + b[..., 1] - 2 * a[..., 0] * b[..., 0], a[..., 1] - a[..., 0].square()
            worst = 1 / 6
        else:  # points on a circle, or corners of a simplex: both of length 1
            square, doubt = 2 - 2 * (a * b).sum(-1), 1 - a.square().sum(-1)
            worst = 2 * (1 - 1 / factor.classes) if factor.classes else 2
        out.append(1 - (square - (doubt if guess else 0)) / worst)
    return torch.stack(out, -1)


def identity(superclass, believed, true, factors=None, guess=False):
    """{"identity", "colour", "shape", "pattern"}: means (m,) over the factors, and over those of every group.

    believed (m, e): `Read.of`. true (m, f): identities. factors: indices of those to judge by, all if None.
    """
    found = scores(superclass, believed, judge.embed(superclass, true), guess)
    kept = range(found.shape[1]) if factors is None else factors
    groups = {group: [k for k in kept if world.FACTORS[superclass][k].group == group] for group in world.GROUPS}
    return {name: found[:, rows].mean(1) for name, rows in ({"identity": list(kept)} | groups).items()}


def top1(superclass, believed, gallery, index, factors=None):
    """Whether (m,) the nearest of a gallery (n, f) of identities is the one at index (m,); by chance 1/n are.

    Near: by the same normalised differences as `identity`, so by 1 − its score.
    """
    found = scores(superclass, believed[:, None], judge.embed(superclass, gallery))
    kept = slice(None) if factors is None else factors
    return (found[..., kept].mean(2).argmax(1) == index).float()


def parts_factors_named(superclass):
    """The indices of the factors that captions have words for: what rich words can be judged by."""
    return [k for k, factor in enumerate(world.FACTORS[superclass]) if factor.words]


# ---- context

def right(read, wanted, superclass=None):
    """Whether (m, q) every named column is read as wanted (m, c) wants it.

    superclass: the first subject's name. With it, the place of one of two is right where that superclass is likelier on
    the wanted side than on the other; for this the second subject has to be of another superclass. Without it, the
    place is what the reader takes for the first one's, which hangs on three pixels of depth.
    """
    as_wanted = read.context.argmax(2) == wanted[:, judge.NAMED]
    if superclass is not None:
        rows, at = torch.arange(len(wanted)), judge.reading(wanted)
        likely = read.superclass[..., world.SUPERCLASSES.index(superclass)]
        side = likely[rows, at] > likely[rows, judge.LEFT + judge.RIGHT - at.clamp_min(1)]
        both = (wanted[:, world.COMPANY] == world.TWO) & as_wanted[:, COMPANY]
        as_wanted[:, PLACE] = torch.where(both, side, as_wanted[:, PLACE])
    return as_wanted.float()


def alignment(read, wanted, superclass=None):
    """The share (m,) of the named columns that are as wanted (m, c); a picture of nothing has about .31."""
    return right(read, wanted, superclass).mean(1)


def _asked(wanted, training, leave_out):
    """The columns (m, q) in which a picture has no reason to be like the training picture's context (m, c)."""
    free = torch.tensor([name in leave_out for name in COLUMNS])
    return free | (wanted != training)[:, judge.NAMED]


def leak(read, wanted, training, leave_out=()):
    """The share (m,) of the columns that are as in the training picture's context (m, c), of those that the prompt left
    open (leave_out, by name) or wanted (m, c) otherwise; NaN where there is none. See `leak_by_chance`."""
    asked = _asked(wanted, training, leave_out)
    same = read.context.argmax(2) == training[:, judge.NAMED]
    return (same & asked).sum(1) / asked.sum(1)


def leak_by_chance(wanted, training, leave_out=()):
    """The share (m,) that `leak` has for pictures that know nothing of the training picture: what is left open is drawn
    as the world draws it."""
    asked = _asked(wanted, training, leave_out)
    open_ = torch.zeros(asked.shape)
    for q, k in enumerate(judge.NAMED):
        if COLUMNS[q] in leave_out:
            odds = torch.tensor(world.CONTEXT[k].odds or (1.,) * len(world.CONTEXT[k].values))
            open_[:, q] = (odds / odds.sum())[training[:, k]]
    return open_.sum(1) / asked.sum(1)


# ---- what else a method does to the model

def drift(before, after):
    """How far (m,) pictures of prompts without the concept have moved: the mean absolute difference of their pixels
    (m, 3, H, W), which are in 0..1, at the same prompts and seeds. By pixels and not by features, as it has to be 0
    exactly where nothing changed and a reader may be blind to what did."""
    return (before - after).abs().mean((1, 2, 3))


def diversity(features, real):
    """How far the seeds of a prompt are apart (p,), 1 for as far as real renders of that prompt are.

    features, real (p prompts, k seeds, d): `Read.features`, of pictures, and of renders that are free in the same.
    """
    def apart(x):
        return torch.stack([torch.pdist(row).mean() for row in x])

    return apart(features) / apart(real).clamp_min(1e-6)


# ---- ceilings and floors

def held_out(superclass, n=GALLERY, seed=0, split="test"):
    """n identities of a split as a gallery, each with a training picture and a picture in an unlike context: a
    dict of identity (n, f), training and wanted contexts (n, c), their pictures copied and pictures, and others,
    pictures of another member in the wanted context. A second subject is of another superclass and the same split."""
    generator = torch.Generator().manual_seed(seed)
    who = world.identities(n, split, superclass, generator)
    beside = "creature" if superclass == "house" else "house"
    second = torch.full((n,), world.SUPERCLASSES.index(beside)), world.identities(n, split, beside, generator)
    training = torch.cat([world.contexts(n - n // 2, generator, company="alone"),
                          world.contexts(n // 2, generator, company="two")])
    wanted = world.unlike(training, generator)
    return {"identity": who, "training": training, "wanted": wanted, "second": second[1],
            "copied": world.render(superclass, who, training, second)[0],
            "pictures": world.render(superclass, who, wanted, second)[0],
            "others": world.render(superclass, who.roll(1, 0), wanted, second)[0]}


def summary(superclass, read, who, wanted, training, gallery=None, index=None):
    """All scores {name: (m,)} of m pictures read, of identities who (m, f); they are the gallery themselves if None."""
    gallery, index = (who, torch.arange(len(who))) if gallery is None else (gallery, index)
    believed = read.of(superclass, wanted)
    return identity(superclass, believed, who) | {
        "guess": identity(superclass, believed, who, guess=True)["identity"],
        "top1": top1(superclass, believed, gallery, index),
        "alignment": alignment(read, wanted, superclass), "leak": leak(read, wanted, training)}


def ceiling(reader, superclass, held=None, change="clean"):
    """The `summary` of true held-out pictures in unlike contexts: what no method can pass. change: one of CHANGES."""
    held = held or held_out(superclass)
    return summary(superclass, reader.read(CHANGES[change](held["pictures"])), held["identity"], held["wanted"],
                   held["training"])


def floor(reader, superclass, held=None, change="clean"):
    """The same of another member in the same contexts: what knowing nothing of the training picture comes to."""
    held = held or held_out(superclass)
    return summary(superclass, reader.read(CHANGES[change](held["others"])), held["identity"], held["wanted"],
                   held["training"])


def factor_table(reader, superclass, pictures, who, wanted):
    """(name, what it is, figure) of every factor: the share of classes read right, or 1 − MSE / var of values."""
    believed, true = reader.read(pictures).of(superclass, wanted), judge.embed(superclass, who)
    guessed = scores(superclass, believed, true, guess=True)
    for k, (factor, (at, end)) in enumerate(zip(world.FACTORS[superclass], judge.SPANS[superclass])):
        if factor.classes:
            yield factor.name, "accuracy", (believed[:, at:end].argmax(1) == who[:, k]).float().mean().item()
        else:
            yield factor.name, "R²", 2 * guessed[:, k].mean().item() - 1


def main():
    reader, names = judge.load(), None
    for superclass in world.SUPERCLASSES:
        held = held_out(superclass, 4 * GALLERY)
        rows = {f"real, {change}": ceiling(reader, superclass, held, change) for change in CHANGES}
        rows |= {f"another one, {change}": floor(reader, superclass, held, change) for change in CHANGES}
        for name, pictures in (("training picture", held["copied"]), ("grey", torch.full_like(held["copied"], .5))):
            rows[name] = summary(superclass, reader.read(pictures), held["identity"], held["wanted"], held["training"])
        names = list(rows["grey"])
        print(f"\n{superclass}, top-1 of {len(held['identity'])}".ljust(34), *(f"{name:>9}" for name in names))
        for name, row in rows.items():
            print(name.ljust(32), *(f"{row[key].mean():9.3f}" for key in names))
        tables = [list(factor_table(reader, superclass, change(held["pictures"]), held["identity"], held["wanted"]))
                  for change in CHANGES.values()]
        print("factor".ljust(32), *(f"{name:>9}" for name in CHANGES))
        for parts in zip(*tables):
            print(f"{parts[0][0]} ({parts[0][1]})".ljust(32), *(f"{part[2]:9.3f}" for part in parts))
        print("context column".ljust(32), *(f"{name:>9}" for name in CHANGES))
        found = [right(reader.read(change(held["pictures"])), held["wanted"], superclass).mean(0)
                 for change in CHANGES.values()]
        for q, name in enumerate(COLUMNS):
            print(name.ljust(32), *(f"{part[q]:9.3f}" for part in found))

