"""Concepts kept apart: each place of a picture belongs to the concept whose word it reads most.

A text encoder puts all words of a prompt into the tokens behind its end, and every place of a picture reads these. So
the edits of two concepts that are both named act everywhere, and two creatures come out as two mixtures of both. What
the base model tells subjects apart by is its attention: a place of the first one reads the first one's word more than
other places do. Keys are locked to the superclass, so attention goes where it goes without the concepts, and one call
with the superclass words in their places, before the first step, tells whose each place is:

    rⱼ(q) = log aⱼ(q) − log mean over q of aⱼ    aⱼ: what place q reads of word j, mean over heads; r: mean over decoder
                                                 layers, smoothed over neighbours
    wⱼ(q) ∝ exp κ (rⱼ(q) − mⱼ)                   share of word j in place q: there j acts and others are off (region.py)

A second word is read in the first one's place too, because its encoding knows of the first; so what counts is how much
more it is read in one subject than in the other. mⱼ is the middle between the most and the least that word j is read
where the words are read at all. The mean of logarithms lets the layers speak that tell subjects apart.

Figures are in bench/results/composition.md. Letters: b rows · N places of a layer · n tokens · j words · h w latent.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad

from .region import Words
from .where import asked, layer_size, reading

KAPPA = 4
LEAST = 1e-4  # of a place's reading over the mean; beyond that a logarithm would say more than it knows
ENDS = 0.1, 0.9  # what counts as least and most, as quantiles


def members(acting: Mapping, on: Words) -> Words:
    """Of the words that act, those that are kept apart; of less than two, none."""
    found = Words(word for word in on if acting[word].apart)
    return found if len(found) > 1 else Words()


@contextmanager
def reads(layers: Iterable[nn.Module], at: Tensor, size: tuple[int, int]):
    """Gather from one model call what its places read of words: `at` (b, n, j) has 1 where they stand, `layers` are
    cross-attentions, `size` is that of the latents. Yields a list that fills with (b, j, h, w) of mean 1, by layer; a
    word that a row does not say has zeros."""
    found = []

    def told(attention, q, k, _):
        grid = layer_size(q.shape[1], *size)
        if grid:  # else another extension has merged places
            # every row, also those that say no word: which these are only the device knows
            a = torch.stack([reading(*row, attention.heads) for row in zip(q, k, at.float())])
            r = (a / a.mean(1, keepdim=True).clamp_min(1e-12)).mT.unflatten(-1, grid)
            found.append(interpolate(r, size, mode="bilinear", align_corners=False))

    with asked(layers, told):
        yield found


def weights(found: Sequence[Tensor]) -> Tensor:
    """Weights (b, j, h, w) of the words in every place, of what is read there in each layer (b, j, h, w): of words
    that a row says they sum to 1, those of others are 0."""
    said = found[0].flatten(2).any(2)[..., None, None]
    r = torch.stack([x.clamp_min(LEAST).log() for x in found]).mean(0)
    r = avg_pool2d(pad(r, (1, 1, 1, 1), mode="replicate"), 3, 1)
    many = said.sum(1, keepdim=True).clamp_min(1)
    read = (r.exp() * said).sum(1, keepdim=True) / many > 1  # more than in the mean of all places
    ends = r.masked_fill(~read, math.nan).flatten(2).nanquantile(r.new_tensor(ENDS), dim=2)
    r = r - ends.mean(0).nan_to_num()[..., None, None]
    return (KAPPA * r).masked_fill(~said, -math.inf).softmax(1).nan_to_num()


def split(where: Mapping[Words, Tensor], acting: Mapping, words: Sequence[str], weight: Tensor) -> dict[Words, Tensor]:
    """Shares (b, h, w) of sets of concepts that act, of those that `where` has (1, h, w): in each, the words that are
    kept apart act one at a time, by their weights (b, j, h, w), for the words."""
    found, where = {}, {on: share.to(weight) for on, share in where.items()}
    weight = dict(zip(words, weight.unbind(1)))
    for on, share in where.items():
        each = members(acting, on)
        named = sorted(each & weight.keys())
        if len(named) < 2:
            found[on] = found.get(on, 0) + share
            continue
        parts = torch.stack([weight[word] for word in named])  # (j, b, h, w)
        total = parts.sum(0)
        parts = torch.where(total > 0, parts / total, 1 / len(named))  # a row that says none of them is edited by none
        if share.shape[1:] != (1, 1):
            parts = interpolate(parts, share.shape[1:], mode="bilinear", align_corners=False)
        for word, part in zip(named, parts):
            alone = on - (each - {word})
            found[alone] = found.get(alone, 0) + share * part
    return found
