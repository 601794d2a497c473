"""Weight offsets against the public code's formula: folded, counted, started and learnt.

Spec: 2302.12228 and section 2 of the spec on it. What a test calls `published` is the formula as printed there, with
the full matrices; the counts and spreads for SD1.5 are the spec's own figures.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perfusion.core.weight_offset import Offset, attention, delta, fold, modulate, modulated, start

from offsets import SHAPES, Cast, close, linear, normal, offset_of, public, published

SD1 = {  # width: the blocks that have it
    320: ("input_blocks.1", "input_blocks.2", "output_blocks.9", "output_blocks.10", "output_blocks.11"),
    640: ("input_blocks.4", "input_blocks.5", "output_blocks.6", "output_blocks.7", "output_blocks.8"),
    1280: ("input_blocks.7", "input_blocks.8", "middle_block", "output_blocks.3", "output_blocks.4", "output_blocks.5"),
}


def untrained(d_out, d_in):
    """The same as PyTorch initialises it, which is how the public code starts."""
    with torch.random.fork_rng():
        torch.manual_seed(d_out + d_in)
        layers = {"1": (1, d_in), "2": (1, d_out), "_column": (d_in, d_in), "_row": (d_out, d_out)}
        layers = {name: nn.Linear(*size) for name, size in layers.items()}
    return {"v": torch.ones(1)} | {
        f"linear{name}.{kind}": t for name, layer in layers.items() for kind, t in layer.state_dict().items()
    }


class Attention(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))


@pytest.fixture(scope="module")
def unet():
    """The attention of SD1.5 by ComfyUI's names, with what stands beside it, without memory."""
    root = nn.Module()
    with torch.device("meta"):
        for width, blocks in SD1.items():
            for path in blocks:
                block = nn.Module()
                block.attn1, block.attn2 = Attention(width, width), Attention(width, 768)
                block.ff = nn.Linear(width, width)
                transformer = nn.Module()
                transformer.proj_in, transformer.transformer_blocks = nn.Linear(width, width), nn.ModuleList([block])
                parent = root
                for part in path.split("."):
                    if not hasattr(parent, part):
                        parent.add_module(part, nn.Module())
                    parent = getattr(parent, part)
                parent.add_module("1", transformer)
    return root


# The published form, folded


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rank_3_form_is_the_published_one(shape, m):
    for seed in range(3):
        t = public(*shape, m, seed * 100)
        folded = fold(t)
        assert folded.output.shape == (3, shape[0]) and folded.input.shape == (2, shape[1])
        close(delta(folded), published(t), 1e-12 * max(1, published(t).abs().max().item()))


def test_the_published_form_by_hand():
    """d_out 1, d_in 2: p = (3, 5), q = 7; L p = (8, 5), R q = 14, so Δ = 14 (8, 5) + 2 (.1, .2) + .5."""
    t = {
        "v": [2], "linear1.weight": [[1], [2]], "linear1.bias": [1, 1], "linear2.weight": [[3]], "linear2.bias": [1],
        "linear_column.weight": [[1, 1], [0, 1]], "linear_column.bias": [0.1, 0.2],
        "linear_row.weight": [[2]], "linear_row.bias": [0.5],
    }
    t = {name: torch.tensor(values, dtype=torch.float64) for name, values in t.items()}
    expected = torch.tensor([[112.7, 70.9]], dtype=torch.float64)
    close(published(t), expected)
    close(delta(fold(t)), expected)


def test_factors_come_back_from_a_published_form_made_of_them():
    offset, (d_out, d_in) = offset_of(6, 9), (6, 9)
    t = public(d_out, d_in)
    p = t["linear1.weight"] @ t["v"] + t["linear1.bias"]
    q = t["linear2.weight"] @ t["v"] + t["linear2.bias"]
    basis = torch.stack([q, torch.ones(d_out).double()])
    t["linear_row.weight"] = offset.output[:2].T @ torch.linalg.pinv(basis.T)  # sends q to A₁ and the ones to A₂
    t["linear_column.weight"] = torch.outer(offset.input[0], p) / (p @ p)  # sends p to C₁
    t["linear_row.bias"], t["linear_column.bias"] = offset.output[2], offset.input[1]
    again = fold(t)
    close(again.output, offset.output)
    close(again.input, offset.input)
    close(delta(again), delta(offset))


def test_folding_is_in_double_precision_whatever_the_file_holds():
    t = public(5, 7, dtype=torch.float32)
    exact = fold({name: x.double() for name, x in t.items()})
    for a, b in zip(fold(t), exact, strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b)


@pytest.mark.parametrize("shape", [(320, 320), (320, 768)], ids=str)
def test_the_public_start_has_the_spread_that_the_spec_measured(shape):
    t = untrained(*shape)
    folded = fold(t)
    close(delta(folded), published(t).double(), 1e-5)
    change, W, x = delta(folded), linear(*shape, bias=False).weight, normal(50, shape[1], seed=3)
    assert 0.18 < change.std() < 0.28
    moved = x @ (W * change).T
    assert 0.18 < moved.norm() / (x @ W.T).norm() < 0.28
    sizes = torch.linalg.svdvals(change)
    assert 0.05 < sizes[1] / sizes[0] < 0.2 and 0.02 < sizes[2] / sizes[0] < 0.12
    assert sizes[3] / sizes[0] < 1e-13


def test_half_precision_hardly_moves_the_weight():
    folded, W = fold(untrained(320, 768)), linear(320, 768, bias=False).weight
    stored = Offset(*(factor.half() for factor in folded))
    assert delta(stored).dtype == torch.float32  # stored in half, used in single
    exact = modulate(W, folded)
    assert (modulate(W, stored) - exact).norm() / exact.norm() < 1e-4  # the spec's: 7e-5


# Which weights, and how many numbers


def test_q_k_and_v_of_self_and_cross_attention_get_offsets_and_nothing_else(unet):
    found = attention(unet)
    assert len(found) == 96
    assert set(found) == {
        f"{block}.1.transformer_blocks.0.{attn}.to_{part}"
        for blocks in SD1.values() for block in blocks for attn in ("attn1", "attn2") for part in "qkv"
    }
    assert found["middle_block.1.transformer_blocks.0.attn2.to_k"].weight.shape == (1280, 768)


def test_sizes_for_sd1_are_the_specs(unet):
    shapes = {name: tuple(module.weight.shape) for name, module in attention(unet).items()}

    def full(shapes):
        return sum(1 + 3 * r + 3 * c + r * r + c * c for c, r in shapes)

    assert full(shapes.values()) == 143_226_592
    assert full(shape for name, shape in shapes.items() if "attn2" in name) == 68_659_504
    assert sum(c * r for c, r in shapes.values()) == 68_730_880
    offsets = start(attention(unet))
    assert sum(factor.half().nbytes for offset in offsets.values() for factor in offset) == 2 * 373_632  # 0.747 MB


def test_a_compiled_model_has_the_same_names():
    inner, outer = nn.Module(), nn.Module()
    inner.attn1 = Attention(4, 4)
    outer.add_module("_orig_mod", inner)
    assert list(attention(outer)) == ["attn1.to_q", "attn1.to_k", "attn1.to_v"]


# The start, and learning


@pytest.mark.parametrize("stored, computed", [
    (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.float8_e4m3fn, torch.float32), (torch.float8_e4m3fn, torch.bfloat16), (torch.float16, torch.float32),
], ids=str)
def test_at_the_start_nothing_changes_to_the_bit(stored, computed):
    module = linear(9, 6, kind=Cast, dtype=stored)
    x = normal(2, 4, 6, seed=7).to(computed)
    plain, offsets = module(x), start({"to_q": module})
    assert not delta(offsets["to_q"]).any()
    with modulated({"to_q": module}, offsets):
        out = module(x)
    assert out.dtype == plain.dtype and torch.equal(out, plain)


def test_the_start_depends_on_seed_and_names_and_not_on_order():
    modules = {"b": linear(4, 3), "a": linear(5, 6)}
    one, two = start(modules), start(dict(reversed(modules.items())))
    assert all(torch.equal(x, y) for name in modules for x, y in zip(one[name], two[name], strict=True))
    assert not torch.equal(one["a"].input, start(modules, seed=1)["a"].input)
    for offset in one.values():
        assert all(factor.is_leaf and factor.requires_grad and factor.dtype == torch.float32 for factor in offset)
        directions = torch.cat([offset.input, torch.ones(1, offset.input.shape[1])])
        assert torch.linalg.matrix_rank(directions) == 3  # or two of the terms would learn the same


def test_gradients_reach_all_factors_once_the_first_step_is_taken():
    module, x = linear(4, 5, dtype=torch.float32), normal(8, 5, seed=2, dtype=torch.float32)
    offset = start({"to_v": module})["to_v"]
    for first in (True, False):
        with modulated({"to_v": module}, {"to_v": offset}):
            module(x).square().sum().backward()
        assert offset.output.grad.abs().min() > 0
        assert not offset.input.grad.any() if first else offset.input.grad.abs().min() > 0
        with torch.no_grad():
            offset.output.sub_(1e-3 * offset.output.grad)
            for factor in offset:
                factor.grad = None
    assert module.weight.grad is None and module.bias.grad is None


def test_the_gradient_is_that_of_the_function():
    W, x = linear(4, 5).weight, normal(3, 5, seed=8).requires_grad_()
    factors = [factor.requires_grad_() for factor in offset_of(4, 5)]
    assert torch.autograd.gradcheck(lambda A, C, x: x @ modulate(W, Offset(A, C)).T, (*factors, x))


def test_a_block_stays_open_over_many_steps_and_learns_a_change_of_rank_3():
    module, x = linear(6, 5, dtype=torch.float32), normal(40, 5, seed=3, dtype=torch.float32)
    aim = nn.functional.linear(x, modulate(module.weight, offset_of(6, 5, dtype=torch.float32)), module.bias)
    offsets = start({"to_k": module})
    learner, losses = torch.optim.Adam(offsets["to_k"], lr=0.05), []
    with modulated({"to_k": module}, offsets):
        for _ in range(200):
            loss = (module(x) - aim).square().mean()
            learner.zero_grad()
            loss.backward()
            learner.step()
            losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]


def test_a_forward_that_is_computed_a_second_time_gives_the_same_gradients():
    module, x = linear(4, 5), normal(3, 5, seed=8).requires_grad_()
    found = []
    for run in (lambda x: module(x), lambda x: checkpoint(lambda x: module(x), x, use_reentrant=False)):
        offset = Offset(*(factor.requires_grad_() for factor in offset_of(4, 5)))
        with modulated({"to_q": module}, {"to_q": offset}):
            found.append(torch.autograd.grad(run(x).square().sum(), (*offset, x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
