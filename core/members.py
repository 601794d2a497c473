"""Whether a picture is of the family that a domain learnt from: how far its class token lies from theirs.

    D(f) = (f − μ)ᵀ (C + ε I)⁻¹ (f − μ) / w        the last class token that the encoder reads; some 1 for a member
    ε    = RIDGE tr C / w

Mahalanobis' distance; see Lee et al. 2018 (arXiv 1807.03888), who tell with it what a classifier has never seen. The
limit is what hardly any member reaches: WIDE standard deviations above the mean, over pictures that μ and C were not
taken from (each half of the pictures is measured against the other). An encoder that is asked about anything else
answers all the same, and its answer is a creature of its own making.

Letters: m pictures · l layers · w width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 0.01
WIDE = 3.5
FEWEST = 32  # pictures of which something can be said


class Members(NamedTuple):
    """What the pictures of a domain look like to its tower."""

    mean: Tensor  # (w) μ
    factor: Tensor  # (w, w) F with Fᵀ F = (C + ε I)⁻¹ / w
    limit: Tensor  # () of D

    def distance(self, seen: Tensor) -> Tensor:
        """D (m) of class tokens (m, l, w)."""
        return ((seen[:, -1].to(self.mean) - self.mean) @ self.factor.T).square().sum(1)

    def far(self, seen: Tensor) -> Tensor:
        """Which of m pictures (m) are beyond the limit."""
        return self.distance(seen) > self.limit


def members_of(seen: Tensor) -> Members | None:
    """Members, in fp32, like those of which the tower has these class tokens (m, l, w); None where they are too few, or
    all alike."""
    last = seen[:, -1].double().cpu()
    if len(last) < FEWEST or not (last - last[0]).any():
        return None
    halves = last[::2], last[1::2]
    apart = torch.cat([_fit(one).distance(other[:, None]) for one, other in (halves, halves[::-1])])
    limit = apart.mean() + WIDE * apart.std()
    return Members(*(t.float() for t in _fit(last)[:2]), limit.float())


def _fit(f: Tensor) -> Members:
    """μ and F of tokens (m, w)."""
    mean, width = f.mean(0), f.shape[1]
    covariance = (f - mean).T @ (f - mean) / len(f)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(width, dtype=f.dtype)
    inverse = torch.linalg.inv(torch.linalg.cholesky(covariance))  # L⁻¹, whose square is the inverse covariance
    return Members(mean, inverse / width**0.5, f.new_tensor(torch.inf))
