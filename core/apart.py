"""Concepts kept apart: each place of a picture belongs to the concept whose word it reads most.

A text encoder puts all words of a prompt into the tokens behind its end, and every place of a picture reads these. So
the edits of two concepts that are both named act everywhere, and two creatures come out as two mixtures of both. What
the base model tells subjects apart by is its attention: a place of the first one reads the first one's word more than
other places do. Keys are locked to the superclass, so attention goes where it goes without the concepts, and one call
with the superclass words in their places, before the first step, tells whose each place is:

    rⱼ(q) = aⱼ(q) / mean over q of aⱼ     aⱼ: what place q reads of word j, mean over heads; r: mean over decoder layers
    wⱼ(q) = rⱼ(q)^κ / Σₖ rₖ(q)^κ          share of word j in place q: there j acts and the others are off (region.py)

Figures are in bench/results/composition.md. Letters: b rows · N places of a layer · n tokens · j words · h w latent.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .region import Words
from .swap import swapped
from .where import layer_size, reading

KAPPA = 4


def members(acting: Mapping, on: Words) -> Words:
    """Of the words that act, those that are kept apart; of less than two, none."""
    found = Words(word for word in on if acting[word].apart)
    return found if len(found) > 1 else Words()


@contextmanager
def reads(layers: Iterable[nn.Module], at: Tensor, size: tuple[int, int]):
    """Gather from one model call what its places read of words: `at` (b, n, j) has 1 where they stand, `layers` are
    cross-attentions, `size` is that of the latents. Yields a list that fills with (b, j, h, w) of mean 1, by layer."""
    found, queries = [], {}
    rows = at.flatten(1).any(1).nonzero().flatten().tolist()

    def query(attention):
        def forward_of(plain):
            def forward(x):
                queries[attention] = plain(x)
                return queries[attention]
            return forward
        return forward_of

    def key(attention):
        def forward_of(plain):
            def forward(x):
                k, q = plain(x), queries.pop(attention)
                grid = layer_size(q.shape[1], *size)
                if grid:  # else another extension has merged places
                    a = q.new_zeros(len(q), q.shape[1], at.shape[-1], dtype=torch.float32)
                    for row in rows:
                        a[row] = reading(q[row], k[row], at[row].to(a), attention.heads)
                    r = (a / a.mean(1, keepdim=True).clamp_min(1e-12)).mT.unflatten(-1, grid)
                    found.append(interpolate(r, size, mode="bilinear", align_corners=False))
                return k
            return forward
        return forward_of

    layers = list(layers)
    with swapped([(m.to_q, query(m)) for m in layers] + [(m.to_k, key(m)) for m in layers]):
        yield found


def split(where: Mapping[Words, Tensor], acting: Mapping, words: Sequence[str], r: Tensor) -> dict[Words, Tensor]:
    """Shares (b, h, w) of sets of concepts that act, of those that `where` has (1, h, w): in each, the words that are
    kept apart act one at a time, by what places read of them, r (b, j, h, w) of the words."""
    found, weight = {}, dict(zip(words, (r**KAPPA).unbind(1)))
    for on, share in where.items():
        each = members(acting, on)
        named = sorted(each & weight.keys())
        if len(named) < 2:
            found[on] = found.get(on, 0) + share
            continue
        parts = torch.stack([weight[word] for word in named])  # (j, b, h, w)
        total = parts.sum(0)
        parts = torch.where(total > 0, parts / total, 1 / len(named))  # a row that names none of them is edited by none
        if share.shape[1:] != (1, 1):
            parts = interpolate(parts, share.shape[1:], mode="bilinear", align_corners=False)
        for word, part in zip(named, parts):
            alone = on - (each - {word})
            found[alone] = found.get(alone, 0) + share.to(part) * part
    return found
