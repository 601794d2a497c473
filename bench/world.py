"""A small world with ground truth, in which personalisation is measured and a miniature of Stable Diffusion is trained.

Why: whether a picture shows *this* creature cannot be judged by a formula on photographs. Here everything is drawn from
numbers, so a network can read them back. A picture shows one subject or two, a creature, a house or a flower (the
superclass), in a context that a caption can name in full. Its identity is twelve factors in three groups, colour, shape
and pattern: captions name some of them coarsely ("a blue striped creature with long ears") and never the others, which
only a picture can teach. Shapes are few, large and plain, so that a small model can learn them in an hour.

Identities to train on and to test on are apart by construction: every factor falls into one of a few coarse bins, the
bins' numbers are summed with the weights LATTICE modulo MODULUS, and the sum says the split: 0 test, 1 dev (to choose
learning rates on), all others train. A change of any one factor by one bin leaves the split, so a test identity is
never a trained one with a detail moved, and yet all words and all values occur in training.

Letters: m pictures of H = W = 128 pixels; f = 12 identity factors (FACTORS); c = 7 context columns (CONTEXT).
"""

import random
import re
from dataclasses import dataclass

import torch

from . import world_creature, world_flower, world_house
from .world_paint import SIZE, Layer
from .world_scene import SHIFTS, THINGS, background

SUPERCLASSES = ("creature", "house", "flower")
MIX = (.6, .2, .2)  # how often each is drawn by sample()
MODULES = (world_creature, world_house, world_flower)
FACTORS = {name: module.FACTORS for name, module in zip(SUPERCLASSES, MODULES)}
GROUPS = ("colour", "shape", "pattern")
MODULUS = 11
LATTICE = torch.tensor((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2))  # none is 0 modulo 11
SPLITS = {"test": (0,), "dev": (1,), "train": tuple(range(2, MODULUS))}
SCALES = (1., 1.12, 1.06)  # houses and flowers are drawn a little larger, to fill as much of the picture
CHUNK = 16  # pictures painted at once: what fits in a core's cache is fastest
NAMED = .85  # how often a training caption names a context column
SHARES = (0, .5, 1, 1)  # of a subject's factors that have words, the share that a training caption names


@dataclass(frozen=True)
class Column:
    """A column of a context tensor: the names of its values, each one's phrasings, and how often each is drawn.

    A column without phrasings is never named: what it does is the picture's own.
    """
    name: str
    values: tuple
    phrases: tuple
    odds: tuple = ()


def column(name, odds=(), **values):
    return Column(name, tuple(values), tuple(tuple(p.split(" / ")) for p in values.values()), odds)


CONTEXT = (
    column("background", studio="in a studio / in a room", meadow="in a meadow / on the grass",
           beach="at the beach / by the sea", night="at night / under the moon", forest="in a forest / in the woods",
           snow="in the snow / in winter", wall="before a brick wall / at a brick wall",
           desert="in a desert / on the dunes", stage="on a stage / before a curtain",
           underwater="under water / at the bottom of the sea"),
    column("place", left="on the left / at the left", middle="in the middle / in the centre",
           right="on the right / at the right"),
    column("size", small="small / little", large="large / big"),
    column("thing", (.4, .12, .12, .12, .12, .12), none="wearing nothing / without anything",
           hat="wearing a hat / with a hat", crown="wearing a crown / with a crown",
           scarf="wearing a scarf / with a scarf", balloon="holding a balloon / with a balloon",
           flag="holding a flag / with a flag"),
    column("style", (.4, .2, .2, .2), flat="a flat drawing of / a flat picture of",
           outlined="an ink drawing of / a comic of",
           pastel="a pastel drawing of / a pale painting of", clay="a clay model of / a clay figure of"),
    column("company", (.8, .2), alone="", two="beside / next to / and"),
    Column("variant", tuple(range(SHIFTS)), ()),  # a small step aside, and which part of the background is seen
)
BACKGROUND, PLACE, SCALE, THING, STYLE, COMPANY, VARIANT = range(len(CONTEXT))
MIDDLE, TWO = 1, 1


def _draw(odds, n, generator):
    return torch.multinomial(torch.tensor(odds), n, replacement=True, generator=generator)


# ---- identities

def bins(superclass, identity):
    """The coarse bins (m, f) of identities (m, f) of one superclass, by its name."""
    return torch.stack([factor.bin(identity[:, k]) for k, factor in enumerate(FACTORS[superclass])], 1)


def split_of(superclass, identity):
    """The sum (m,) that says the split of identities (m, f) of one superclass: see SPLITS."""
    return (bins(superclass, identity) * LATTICE).sum(1) % MODULUS


def identities(n, split, superclass, generator):
    """n random identities (n, f) of a superclass, by its name, and of a split: "train", "dev" or "test"."""
    found = []
    while sum(map(len, found)) < n:
        draw = torch.rand(4 * n + 64, len(LATTICE), generator=generator)
        for k, factor in enumerate(FACTORS[superclass]):
            if factor.kind == "categorical":
                draw[:, k] = (draw[:, k] * factor.classes).floor()
        found.append(draw[torch.isin(split_of(superclass, draw), torch.tensor(SPLITS[split]))])
    return torch.cat(found)[:n]


# ---- contexts

def contexts(n, generator, **fixed):
    """n random contexts (n, c). fixed: columns that have one value, by name: style="flat"."""
    context = torch.stack([_draw(c.odds or (1.,) * len(c.values), n, generator) for c in CONTEXT], 1)
    for k, c in enumerate(CONTEXT):
        if c.name in fixed:
            context[:, k] = c.values.index(fixed[c.name])
    side = 2 * torch.randint(2, (n,), generator=generator)
    context[:, PLACE] = torch.where(_crowded(context), side, context[:, PLACE])
    return context


def _crowded(context):
    """Where two subjects would both stand in the middle: they stand left and right."""
    return (context[:, COMPANY] == TWO) & (context[:, PLACE] == MIDDLE)


def unlike(context, generator):
    """Random contexts (m, c) that differ from the given ones in every column."""
    other = torch.stack([
        (context[:, k] + torch.randint(1, len(c.values), (len(context),), generator=generator)) % len(c.values)
        for k, c in enumerate(CONTEXT)], 1)
    # of two places unlike the given one, a side is always left: the other one
    other[:, PLACE] = torch.where(_crowded(other), 2 - context[:, PLACE], other[:, PLACE])
    return other


# ---- pictures

def render(superclass, identity, context, second=None):
    """Draw subjects in their contexts: pictures (m, 3, H, W) in 0..1, and where the subjects are seen (m, 3, H, W).

    superclass (m,): indices into SUPERCLASSES, or one name for all. identity (m, f), context (m, c).
    second: the (superclass, identity) of the other subjects, for the contexts with company, else ignored; None: a twin.
    masks[:, 0] is of the subjects, masks[:, 1] of the second ones, masks[:, 2] of what is worn or held.
    """
    m = len(identity)
    superclass = _indices(superclass, m)
    other, other_identity = (superclass, identity) if second is None else (_indices(second[0], m), second[1])
    two = context[:, COMPANY] == TWO
    pictures = background(context[:, BACKGROUND], context[:, STYLE], context[:, VARIANT])
    masks = torch.zeros(m, 3, SIZE, SIZE)
    layers = (other, other_identity, two), (superclass, identity, torch.ones_like(two))  # the second ones stand behind
    for place, (kinds, who, rows) in enumerate(layers):
        for kind in range(len(SUPERCLASSES)):
            for chunk in (rows & (kinds == kind)).nonzero()[:, 0].split(CHUNK):
                painted, cover, shadow, mask, held = _subject(kind, who[chunk], context[chunk], first=place == 1)
                pictures[chunk] = painted + (1 - cover) * (1 - shadow) * pictures[chunk]
                masks[chunk, 1] = masks[chunk, 1] * (1 - cover[:, 0])
                masks[chunk, 1 - place], masks[chunk, 2] = mask, held
    return pictures.clamp_(0, 1), masks


def _indices(superclass, m):
    return torch.full((m,), SUPERCLASSES.index(superclass)) if isinstance(superclass, str) else superclass


def _subject(kind, identity, context, first):
    """The subjects of one superclass on nothing: premultiplied pictures, their coverage, shadows, masks, masks of what
    they wear or hold."""
    place, size, two = context[:, PLACE], context[:, SCALE], context[:, COMPANY] == TWO
    u = torch.where(two, torch.tensor((27., 39.))[size], torch.tensor((31., 47.))[size]) * SCALES[kind]
    step = torch.tensor((26., 24.))[size] + 4 * two
    side = (place - 1.) * (1 if first else -1)
    middle = SIZE / 2 + side * step + (context[:, VARIANT] % 4 - 1.5) * 1.6
    ground = torch.tensor((110., 120.))[size] - 3 * (not first)
    u, middle, ground = (t[:, None, None] for t in (u, middle, ground))
    pixel = torch.arange(SIZE) + .5
    x, y = (pixel - middle) / u, (pixel[:, None] - ground) / u + 1
    x, y = x.expand(-1, SIZE, -1).contiguous(), y.expand(-1, -1, SIZE).contiguous()
    inward = torch.where(side > 0, -1., 1.)[:, None, None]  # tails and balloons have room there

    factors = {factor.name: identity[:, k, None, None] for k, factor in enumerate(MODULES[kind].FACTORS)}
    factors |= {factor.name: factors[factor.name].long() for factor in MODULES[kind].FACTORS if factor.classes}
    layer = Layer(u, context[:, STYLE, None, None])
    MODULES[kind].draw(layer, x, y, inward, factors)
    painted, cover = layer.finish()
    mask, held = cover[:, 0].clone(), torch.zeros_like(cover[:, 0])
    if first:
        maps = x, y, *MODULES[kind].anchors(factors), inward
        for thing, paint in enumerate(THINGS, 1):
            rows = (context[:, THING] == thing).nonzero()[:, 0]
            if len(rows):
                layer = Layer(u[rows], context[rows, STYLE, None, None])
                paint(layer, *(tuple(t[rows] for t in a) if isinstance(a, tuple) else a[rows] for a in maps))
                over, hidden = layer.finish()
                painted[rows] = over + (1 - hidden) * painted[rows]
                cover[rows] = hidden + (1 - hidden) * cover[rows]
                mask[rows] *= 1 - hidden[:, 0]
                held[rows] = hidden[:, 0]
    shadow = .28 * (1 - (x / .8).square() - ((y - 1) / .12).square()).clamp(0, 1)[:, None]
    return painted, cover, shadow, mask, held


# ---- captions

_VOWEL = re.compile(r"\ba (?=[aeiou])")
_OPENINGS = ("a picture of", "a drawing of", "a photo of", "a good photo of", "the photo of", "image of",
             "a photograph of", "")
_SHOWN = "shown in a photo"  # with these, all words of the templates that a concept is learnt with are in captions


def _subject_words(superclass, coarse, said):
    """(adjectives and noun, what follows it): the factors in said (f), of those that have words, by their bins."""
    words = [(factor.adjective, factor.words[value])
             for factor, value, say in zip(FACTORS[superclass], coarse, said) if say and factor.words]
    tail = " and ".join(word for adjective, word in words if not adjective)
    return " ".join([word for adjective, word in words if adjective] + [superclass]), f"with {tail}" if tail else ""


def _sentence(context, said, subject, second, rng):
    """One caption. said (c): the context columns to name. subject, second: _subject_words. rng None: plain wording."""
    def pick(phrases):
        return rng.choice(phrases) if rng else phrases[0]

    scene, where, size, thing, opening, joined = (
        pick(CONTEXT[k].phrases[context[k]]) if said[k] else "" for k in range(VARIANT))
    article = "the" if rng and rng.random() < .1 else "a"
    words = [opening or pick(_OPENINGS), article, size, *subject, thing, where]
    if context[COMPANY] == TWO:  # the place is the first subject's, so it is said before the second one comes
        words += [joined, "a", *second]
    words = [scene, ",", *words] if scene and rng and rng.random() < .2 else [*words, scene]
    if not opening and rng and rng.random() < .2:
        words.append(_SHOWN)
    return _VOWEL.sub("an ", " ".join(" ".join(words).split()).replace(" ,", ","))


def _rng(generator):
    return random.Random(int(torch.randint(2 ** 62, (), generator=generator))) if generator else None


def _captions(superclass, identity, context, second, rng, mode):
    """Captions of m pictures; mode: None as in training, else the share of the factors to name."""
    m = len(context)
    other = second or (superclass, identity)
    known = [bins(name, who).tolist() for _, who in ((superclass, identity), other) for name in SUPERCLASSES]
    kinds = [_indices(kinds, m).tolist() for kinds, _ in ((superclass, identity), other)]
    captions = []
    for row, values in enumerate(context.tolist()):
        subjects = []
        for place in (0, 1):
            share = rng.choice(SHARES) if mode is None else mode
            said = [share == 1 or rng.random() < share for _ in range(len(LATTICE))]
            kind = kinds[place][row]
            subjects.append(_subject_words(SUPERCLASSES[kind], known[place * len(SUPERCLASSES) + kind][row], said))
        said = [k == COMPANY or mode is not None or rng.random() < (NAMED if value or k not in (THING, STYLE) else .5)
                for k, value in enumerate(values)]
        captions.append(_sentence(values, said, *subjects, rng))
    return captions


def captions(superclass, identity, context, second, generator):
    """Training captions, a list of m: each context column named with probability NAMED (that nothing is worn, and that
    the drawing is flat, less often: these are what goes without saying), and some factors of the subjects."""
    return _captions(superclass, identity, context, second, _rng(generator), None)


def rich_caption(superclass, identity, context, second=None, generator=None):
    """Captions with the whole context and all coarse words that captions ever use; without a generator, one wording."""
    return _captions(superclass, identity, context, second, _rng(generator), 1)


def rich_subject(superclass, identity):
    """All coarse words that captions ever use for one subject's identity (1, f): "green plain creature with …"."""
    (coarse,) = bins(superclass, identity).tolist()
    return " ".join(_subject_words(superclass, coarse, [True] * len(LATTICE)))


def context_caption(context, subject, second="house", leave_out=(), generator=None):
    """Captions, a list of m, of a subject given in words ("creature", "<mimi>") in the whole context.

    second: the other subject's words. leave_out: names of columns to say nothing of, for under-specified prompts.
    """
    rng, said = _rng(generator), [column.name not in leave_out for column in CONTEXT]
    return [_sentence(row, said, (subject, ""), (second, ""), rng) for row in context.tolist()]


WORDS = tuple(sorted({word for phrase in (
    *(phrase for column in CONTEXT for phrases in column.phrases for phrase in phrases),
    *(word for factors in FACTORS.values() for factor in factors for word in factor.words),
    *SUPERCLASSES, *_OPENINGS, _SHOWN, "an", ",", "with and") for word in phrase.split()}))


# ---- both

def sample(n, generator, split="train"):
    """n pictures with all that is known of them, in a dict:

    pictures (n, 3, H, W), masks (n, 3, H, W), captions (list), superclass (n,), identity (n, f), context (n, c),
    second_superclass (n,), second_identity (n, f). Both subjects' identities are of the split.
    """
    context = contexts(n, generator)
    kinds = _draw(MIX, 2 * n, generator)
    who = torch.zeros(2 * n, len(LATTICE))
    for k, name in enumerate(SUPERCLASSES):
        rows = kinds == k
        who[rows] = identities(int(rows.sum()), split, name, generator)
    first, second = (kinds[:n], who[:n]), (kinds[n:], who[n:])
    pictures, masks = render(*first, context, second)
    return {"pictures": pictures, "masks": masks, "captions": captions(*first, context, second, generator),
            "superclass": first[0], "identity": first[1], "context": context,
            "second_superclass": second[0], "second_identity": second[1]}
