"""The edit of key_lock.py with another concept in every row of a batch, for learning to make concepts.

    i* = the row's own encoding at its word     d = C⁻¹ i* / (i*ᵀ C⁻¹ i*)     s = d · x     g = σ((s − β) / τ)
    K = W (x − s i* + g i*)                     keys locked to what the word says, where Perfusion has the superclass
    V = W (x − s i*) + g o*,  o* = W i* + u     what comes from the encoder is u alone

By linearity W (x − s i*) + g W i* is W of what the keys read, so nothing ever reads W. i* is in reach of the gradient,
which reaches the word embedding through it; in key_lock.py it is given.

Letters: b batch · n tokens · d text width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import key_lock


class RowEdit:
    """For `key_lock.edited`: the edit of a context (b, n, d) whose word is at (b), with u (b, d_out) by value
    projection and C⁻¹ (d, d). It computes in the context's dtype, for which half precision would be too coarse."""

    def __init__(self, context: Tensor, at: Tensor, C_inv: Tensor, u: Mapping[str, Tensor]):
        i = context[torch.arange(len(context)), at]  # (b, d)
        d = i @ C_inv
        s = context @ (d / (d * i).sum(-1, keepdim=True))[..., None]  # (b, n, 1)
        self.gate = key_lock.gate(s, key_lock.TRAIN_BIAS, key_lock.TRAIN_TEMPERATURE)
        self.read = context + (self.gate - s) * i[:, None]
        self.target_output = {name: part[:, None] for name, part in u.items()}

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What keys and values read, both (b, n, d), and the gates (b, n, 1)."""
        read = self.read.to(x.dtype)
        return read, read, self.gate
