"""Random weight offsets in the public code's form and folded, and linear layers for them."""

import torch
from torch import nn

from perfusion.core.weight_offset import Offset

SHAPES = [(5, 7), (7, 5), (6, 6), (3, 8), (1, 1)]  # (d_out, d_in); below rank 3 as well


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b.to(a), rtol=0, atol=tolerance)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def public(d_out, d_in, m=1, seed=0, dtype=torch.float64):
    """One module of the public code with random parameters, as its state dict."""
    shapes = {"1": (d_in, m), "2": (d_out, m), "_column": (d_in, d_in), "_row": (d_out, d_out)}
    tensors = {"v": normal(m, seed=seed, dtype=dtype)}
    for k, (name, shape) in enumerate(shapes.items()):
        tensors[f"linear{name}.weight"] = normal(*shape, seed=seed + 10 * k + 1, dtype=dtype)
        tensors[f"linear{name}.bias"] = normal(shape[0], seed=seed + 10 * k + 2, dtype=dtype)
    return tensors


def published(t):
    """Δ as the spec prints it: Δᵀ = ((W_c M) + b_c 1ᵀ) W_rᵀ + 1 b_rᵀ with M = p qᵀ."""
    p = torch.einsum("rm,m->r", t["linear1.weight"], t["v"]) + t["linear1.bias"]
    q = torch.einsum("cm,m->c", t["linear2.weight"], t["v"]) + t["linear2.bias"]
    M = torch.outer(p, q)
    columns = t["linear_column.weight"] @ M + torch.outer(t["linear_column.bias"], torch.ones_like(q))
    rows = columns @ t["linear_row.weight"].T + torch.outer(torch.ones_like(p), t["linear_row.bias"])
    return rows.T


def offset_of(d_out, d_in, seed=0, scale=0.3, dtype=torch.float64):
    return Offset(scale * normal(3, d_out, seed=seed, dtype=dtype), normal(2, d_in, seed=seed + 1, dtype=dtype))


def linear(d_out, d_in, bias=True, dtype=torch.float64, kind=nn.Linear):
    module = kind(d_in, d_out, bias=bias, dtype=torch.float32).requires_grad_(False)
    module.weight.copy_(normal(d_out, d_in, seed=5))
    if bias:
        module.bias.copy_(normal(d_out, seed=6))
    return module.to(dtype)


class Cast(nn.Linear):
    """Keeps its weight in one dtype and computes in another, as a host does with 8-bit weights."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
