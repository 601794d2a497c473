"""The judge of the bench: a small convolutional network that reads a picture's numbers back.

It is unlike any encoder that the bench compares (convolutions and BatchNorm, no patches, nothing pretrained), and it
says what it *believes*, not what it would guess: of a hue the mean point on the circle, of a length its mean and mean
square, of a class the probabilities. So a picture that tells nothing is scored like a random one, never like the mean.

Where two subjects stand, nothing in a degraded picture says for sure which is the first. So a picture is read three
times, as one of a lone subject, of the left one and of the right one, and the wanted context says which reading counts
(`Read.of`). The factors are read for every superclass: `of` gives those of the wanted one.

Letters: m pictures (m, 3, 128, 128) in 0..1; s = 3 readings (LONE, LEFT, RIGHT); v = 3 superclasses; f = 12 factors;
e = BELIEF columns in which an identity or a belief of it is written (see `embed`); q = 6 named context columns.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from . import world

WEIGHTS = Path(__file__).with_name("reader.safetensors")
LONE, LEFT, RIGHT = range(3)
NAMED = [k for k, column in enumerate(world.CONTEXT) if column.phrases]
VALUES = [len(world.CONTEXT[k].values) for k in NAMED]
SPANS = {}  # of every superclass, the first column of every factor and the one behind the last
for _name, _factors in world.FACTORS.items():
    _ends = [0]
    for _factor in _factors:
        _ends.append(_ends[-1] + (_factor.classes or 2))
    SPANS[_name] = list(zip(_ends, _ends[1:]))
BELIEF = max(spans[-1][1] for spans in SPANS.values())
STEM, CHANNELS, HEADS, HIDDEN = 24, (40, 80, 112), 4, 144


def embed(superclass, identity):
    """Identities (m, f) of one superclass, by its name, as certain beliefs (m, e): of a hue its cosine and sine, of a
    length itself and its square, of a class a 1 among zeros."""
    out = identity.new_zeros(len(identity), BELIEF)
    for k, (factor, (at, end)) in enumerate(zip(world.FACTORS[superclass], SPANS[superclass])):
        value = identity[:, k]
        if factor.kind == "categorical":
            out[:, at:end] = F.one_hot(value.long(), factor.classes)
        else:
            turn = 2 * math.pi * value
            pair = (turn.cos(), turn.sin()) if factor.kind == "circular" else (value, value.square())
            out[:, at:end] = torch.stack(pair, 1)
    return out


def _believe(superclass, raw):
    """What the network puts out (…, e) as beliefs (…, e)."""
    parts = []
    for factor, (at, end) in zip(world.FACTORS[superclass], SPANS[superclass]):
        x = raw[..., at:end]
        if factor.kind == "categorical":
            parts.append(x.softmax(-1))
        elif factor.kind == "circular":
            parts.append(x / x.norm(dim=-1, keepdim=True).clamp_min(1))  # no mean of points lies outside the circle
        else:  # a mean, and a variance, which in 0..1 is at most 1/4
            mean = x[..., :1].clamp(0, 1)
            parts.append(torch.cat([mean, mean.square() + x[..., 1:].sigmoid() / 4], -1))
    return F.pad(torch.cat(parts, -1), (0, BELIEF - SPANS[superclass][-1][1]))


@dataclass
class Read:
    """What is read of m pictures: superclass (m, s, v) and context (m, q, 10) probabilities, identity (m, s, v, e)
    beliefs, features (m, 112) of no unit."""
    superclass: torch.Tensor
    identity: torch.Tensor
    context: torch.Tensor
    features: torch.Tensor

    def of(self, superclass, context):
        """Beliefs (m, e) of the first subject, one superclass by its name, where the contexts (m, c) want it."""
        return self.identity[torch.arange(len(context)), reading(context), world.SUPERCLASSES.index(superclass)]


def reading(context):
    """Which reading (m,) is the first subject's in contexts (m, c)."""
    side = torch.where(context[:, world.PLACE] == 0, LEFT, RIGHT)
    return torch.where(context[:, world.COMPANY] == world.TWO, side, LONE)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(*(layer for _ in range(2) for layer in (
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False))))

    def forward(self, x):
        return x + self.body(x)


class Reader(nn.Module):
    """Below a million parameters, 150 million multiplications a picture. What is seen where is laid out once for all
    readings; each reading adds what its own attention finds."""

    def __init__(self):
        super().__init__()
        a, b, c = CHANNELS
        self.body = nn.Sequential(
            nn.Conv2d(5, STEM, 5, stride=2, padding=2), nn.BatchNorm2d(STEM), nn.ReLU(),
            nn.Conv2d(STEM, a, 3, stride=2, padding=1), Block(a), Block(a),
            nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3, stride=2, padding=1), Block(b), Block(b),
            nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, c, 3, stride=2, padding=1), Block(c),
            nn.BatchNorm2d(c), nn.ReLU())
        self.look = nn.Conv2d(c, 4 * HEADS, 1)  # for the three readings and the context
        self.place = nn.Parameter(torch.randn(4 * HEADS, 8, 8))
        self.laid = nn.Sequential(nn.Conv2d(c, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(),
                                  nn.Linear(24 * 64, HIDDEN))
        self.spread = nn.BatchNorm1d(HEADS * c, affine=False)  # what all pictures share would drown what they differ in
        self.own = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.subject = nn.Linear(HEADS * c, HIDDEN)
        self.factors = nn.Linear(HIDDEN, 3 + 3 * BELIEF)
        nn.init.zeros_(self.factors.weight)
        nn.init.constant_(self.factors.bias, .5)  # the mean of lengths; no matter to classes
        self.scene = nn.Linear(HEADS * c + HIDDEN, sum(VALUES))
        axis = torch.linspace(-1, 1, world.SIZE)
        self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="ij")), persistent=False)

    def forward(self, pictures):
        """Raw: (m, s, 3 + 3e) of the readings, (m, sum of VALUES) of the context, features (m, 112)."""
        m = len(pictures)
        x = torch.cat([pictures * 2 - 1, self.grid.to(pictures.dtype).expand(m, -1, -1, -1)], 1)
        x = self.body(x.contiguous(memory_format=torch.channels_last))
        weight = (self.look(x) + self.place).flatten(2).float().softmax(-1).to(x.dtype)
        pooled = (weight @ x.flatten(2).transpose(1, 2)).view(m, 4, -1)  # (m, readings and context, heads · channels)
        pooled = self.spread(pooled.float().flatten(0, 1)).view_as(pooled)
        laid = F.relu(self.laid(x))
        own = torch.stack([layer(laid) for layer in self.own], 1)
        hidden = F.relu(self.subject(pooled[:, :3]) + own)
        scene = self.scene(torch.cat([pooled[:, 3].to(laid.dtype), laid], 1))
        return self.factors(hidden).float(), scene.float(), x.mean((2, 3)).float()

    @torch.no_grad()
    def read(self, pictures, chunk=32):
        """What is read of pictures (m, 3, H, W) in 0..1: a `Read`."""
        parts = [self(part) for part in pictures.clamp(0, 1).float().split(chunk)]
        subjects, scene, features = (torch.cat(t) for t in zip(*parts))
        beliefs = [_believe(name, subjects[..., 3 + k * BELIEF:3 + (k + 1) * BELIEF])
                   for k, name in enumerate(world.SUPERCLASSES)]
        context = [F.pad(x.softmax(1), (0, max(VALUES) - x.shape[1])) for x in scene.split(VALUES, 1)]
        return Read(subjects[..., :3].softmax(-1), torch.stack(beliefs, 2), torch.stack(context, 1), features)


@cache
def load():
    """The trained reader."""
    reader = Reader()
    state = {k: t.float() for k, t in safetensors.torch.load_file(WEIGHTS).items()}
    reader.load_state_dict(reader.state_dict() | state)
    return reader.eval().requires_grad_(False)
