"""Multiplicative offsets on attention weights, shared by a domain (E4T, Gal et al. 2023, arXiv 2302.12228).

    W' = W ⊙ (1 + Δ)                      element-wise, on q, k and v of self- and cross-attention, not on to_out
    Δ  = A₁ C₁ᵀ + A₂ C₂ᵀ + A₃ 1ᵀ          (d_out, d_in), of rank 3 at most; A (3, d_out), C (2, d_in)

The paper draws Δ as learned constants, two linear layers whose answers p (d_in) and q (d_out) make the matrix p qᵀ, and
a linear layer along each of its axes. In the public code's parameters, per weight:

    p = linear1(v)    q = linear2(v)
    Δᵀ = (L p qᵀ + l 1ᵀ) Rᵀ + 1 rᵀ        L, l = linear_column (on d_in!)     R, r = linear_row (on d_out)
    Δ  = (R q)(L p)ᵀ + (R 1) lᵀ + r 1ᵀ    so A = [R q, R 1, r] and C = [L p, l], exactly

The third input vector is all ones and is not kept: 3 d_out + 2 d_in numbers a weight. For SD1.5 (96 weights) that is
373,632 numbers, 0.75 MB in fp16, instead of 143,226,592, or 573 MB in fp32; any number of learned constants folds
alike. We train A and C themselves: the same Δ can be reached, on another way. A starts at zero, so that Δ does (the
public code starts at a spread of 0.22, with a broken model), and C apart from each other and from the ones, so that
the three terms learn different things. Nothing but its rank regularises Δ: no public code does more.

Offset and weight are multiplied in fp32 or wider, whatever they are stored in, and only the result is rounded.
Letters: A `output`, C `input`.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .swap import swapped


class Offset(NamedTuple):
    """The factors of one weight's Δ."""

    output: Tensor  # (3, d_out) A: the last is what a whole row of W is scaled by
    input: Tensor  # (2, d_in) C


def attention(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every `to_q`, `to_k` and `to_v` of self- and cross-attention by its dotted name (SD1.5: 96, SDXL: 420)."""
    kinds = tuple(f"{attn}.to_{part}" for attn in ("attn1", "attn2") for part in "qkv")
    return {
        name.replace("_orig_mod.", ""): module  # torch.compile puts that before what it compiled
        for name, module in unet.named_modules()
        if name.endswith(kinds)
    }


def start(modules: Mapping[str, torch.nn.Module], seed: int = 0, device=None) -> dict[str, Offset]:
    """Offsets for these modules, in fp32, to be learnt: Δ is zero and has a gradient in all of A at once, and in C as
    soon as A is not zero. They depend on the seed and on names and shapes, not on the order or on the device."""
    r = torch.Generator().manual_seed(seed)
    offsets = {}
    for name in sorted(modules):
        d_out, d_in = modules[name].weight.shape
        factors = torch.zeros(3, d_out), torch.randn(2, d_in, generator=r)
        offsets[name] = Offset(*(factor.to(device).requires_grad_() for factor in factors))
    return offsets


def delta(offset: Offset) -> Tensor:
    """Δ (d_out, d_in) in fp32 or wider. Sums of products, because autocast would halve a matrix product's digits."""
    first, second, rows = offset.output.to(torch.promote_types(offset.output.dtype, torch.float32))[:, :, None]
    return first * offset.input[0] + second * offset.input[1] + rows


def modulate(weight: Tensor, offset: Offset) -> Tensor:
    """W ⊙ (1 + Δ) of a weight (d_out, d_in) in any floating dtype, in that of Δ."""
    change = delta(offset)
    return weight.to(change.dtype) * (1 + change)


def fold(tensors: Mapping[str, Tensor]) -> Offset:
    """The factors, in fp64, of one module `wo_q`, `wo_k` or `wo_v` of the public code, given as its state dict.

    Shapes: `v` (m); `linear1` (d_in, m), `linear2` (d_out, m), `linear_column` (d_in, d_in) and `linear_row`
    (d_out, d_out), each a `.weight` with a `.bias`. m is 1 in the public files. Raises ValueError for anything else.
    """
    came = {name: tuple(t.shape) for name, t in tensors.items()}
    m, d_in, d_out = (came[name][0] if came.get(name) else 0 for name in ("v", "linear1.bias", "linear2.bias"))
    wanted = {"v": (m,)}
    for name, out, into in (("1", d_in, m), ("2", d_out, m), ("_column", d_in, d_in), ("_row", d_out, d_out)):
        wanted |= {f"linear{name}.weight": (out, into), f"linear{name}.bias": (out,)}
    if came != wanted:
        wrong = [f"{name} should be {wanted.get(name, 'absent')} and is {came.get(name, 'absent')}"
                 for name in sorted(wanted | came) if came.get(name) != wanted.get(name)]
        raise ValueError(
            f"These are not the weight offsets of one attention weight: {'; '.join(wrong)}. Give weight_offsets.pt "
            "as the public e4t-diffusion code saves it, complete."
        )
    t = {name: tensor.double() for name, tensor in tensors.items()}
    p = t["linear1.weight"] @ t["v"] + t["linear1.bias"]  # (d_in)
    q = t["linear2.weight"] @ t["v"] + t["linear2.bias"]  # (d_out)
    R = t["linear_row.weight"]
    return Offset(
        torch.stack([R @ q, R.sum(1), t["linear_row.bias"]]),
        torch.stack([t["linear_column.weight"] @ p, t["linear_column.bias"]]),
    )


def check_fit(modules: Mapping[str, torch.nn.Module], offsets: Mapping[str, Offset]) -> None:
    """Raise ValueError unless each offset has a module of its name, and the shape of that module's weight."""
    for name, offset in offsets.items():
        came, wanted, has = (tuple(offset.output.shape), tuple(offset.input.shape)), None, "has no weight of that name"
        if name in modules:
            d_out, d_in = modules[name].weight.shape
            wanted, has = ((3, d_out), (2, d_in)), f"needs {(3, d_out)} and {(2, d_in)}"
        if came != wanted:
            raise ValueError(
                f"The weight offset of {name} has factors of shape {came[0]} and {came[1]}, and the model {has}. "
                "Use the base model that the domain was trained on, or train the domain again on this one."
            )


@contextmanager
def modulated(modules: Mapping[str, torch.nn.Module], offsets: Mapping[str, Offset]):
    """While the block is open the modules (nn.Linear by name) that have an offset answer with W ⊙ (1 + Δ).

    Only their `forward` is swapped, and put back, whatever happens inside: it shows the modulated weight to the
    module's own forward, or to another extension's, for that one call. Δ is computed anew in each call, so that the
    block may stay open over many steps of an optimiser, and other edits of the modules may lie around it or inside it.
    The way back belongs inside the block where gradient checkpointing computes a forward again.
    """
    check_fit(modules, offsets)

    def under(module, offset):
        def forward_of(plain):
            def forward(x):
                held = module._parameters  # module.weight takes a Parameter only, and this one is computed
                weight = held["weight"]
                held["weight"] = modulate(weight, offset).to(x.dtype)
                try:
                    return plain(x)
                finally:
                    held["weight"] = weight

            return forward

        return forward_of

    with swapped((modules[name], under(modules[name], offset)) for name, offset in offsets.items()):
        yield
