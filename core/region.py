"""Where in the picture a concept may act.

    w_S = Πⱼ∈S mⱼ Πⱼ∉S (1 − mⱼ)               share of a set S of concepts in a pixel, from their regions m in 0..1
    a(q) = Σ_S w_S(q) softmax(q K_Sᵀ / √d) V_S    K_S, V_S: keys and values where S acts, and the others are off

Keys and values have no pixels, so attention is computed once for each set that has a share anywhere, and blended by
query. The shares of a pixel sum to 1 and do not depend on an order; regions that do not overlap cost one more attention
each, and one region of all ones or all zeros costs none. A layer's queries are a smaller picture of the same shape, of
which each takes the mean share of the pixels that it stands for.

Letters: b batch · q queries · n tokens · d width · p sets.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .key_lock import edited
from .swap import swapped

Words = frozenset[str]


def shares(regions: Mapping[str, Tensor]) -> dict[Words, Tensor]:
    """Share (1, h, w) of every set that has one, by the words of those outside of it, for regions (1, h, w) by word."""
    found = {Words(): torch.ones(1, 1, 1)}
    size = [max(region.shape[side] for region in regions.values()) for side in (1, 2)] if regions else None
    for word, region in sorted(regions.items()):
        inside = interpolate(region[None].float().cpu(), size, mode="bilinear")[0]
        found = {words: part for away, share in found.items()
                 for words, part in ((away, share * inside), (away | {word}, share * (1 - inside))) if part.any()}
    return found


def grid(queries: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of as many queries as a layer has, in the proportions of latents (h, w)."""
    wanted = size[0] / size[1]
    heights = [h for h in range(1, queries + 1) if queries % h == 0]
    best = min(heights, key=lambda h: max(h * h / queries / wanted, wanted * queries / h / h))
    return best, queries // best


class Blend:
    """The answers of one call's layers, from those of p sets with shares (1 or b, h, w), for latents of a size."""

    def __init__(self, shares: Sequence[Tensor], size: tuple[int, int]):
        self.shares, self.size, self.maps = torch.stack(torch.broadcast_tensors(*shares), 1), size, {}  # (b, p, h, w)

    def row(self, k: int) -> "Blend":
        """The blend of one row alone."""
        return Blend(self.shares[k : k + 1].unbind(1), self.size) if len(self.shares) > 1 else self

    def __call__(self, answers: Tensor) -> Tensor:
        """(b, q, d) of (b, p, q, d). Where all sets answer the same the blend is that, to the bit."""
        queries = answers.shape[2]
        if queries not in self.maps:
            small = interpolate(self.shares.to(answers.device), grid(queries, self.size), mode="area")
            self.maps[queries] = small.flatten(2)[..., None].to(answers.dtype)  # (b, p, q, 1)
        first, *others = answers.unbind(1)
        _, *weights = self.maps[queries].unbind(1)
        return first + sum(weight * (other - first) for weight, other in zip(weights, others))


class Side:
    """For `key_lock.edited`: several edits side by side, p answers for each row."""

    def __init__(self, edits: Sequence):
        self.edits, self.target_output = edits, edits[0].target_output

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*(edit(x) for edit in self.edits)))


@contextmanager
def blended(layers: Iterable[nn.Module], projections: Mapping[str, nn.Module], edits: Sequence, blend: Blend):
    """While open, cross-attention `layers` answer with the blend of the edits (p).

    From to_q to to_out a row is p rows side by side, so whatever computes the attention between them, another extension
    too, sees a batch of rows in their order, and is called once. Yields what `edited` does.
    """

    def query(plain):
        return lambda x: plain(x).repeat_interleave(len(edits), 0)

    def out(plain):
        return lambda x: plain(blend(x.unflatten(0, (-1, len(edits)))))

    pairs = [pair for layer in layers for pair in ((layer.to_q, query), (layer.to_out[0], out))]
    with edited(projections, Side(edits)) as of, swapped(pairs):
        yield of
