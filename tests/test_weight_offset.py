"""Weight offsets against the public code's formula, and a model that has to be left as it was.

Spec: 2302.12228 and section 2 of the spec on it. What a test calls `published` is the formula as printed there, with
the full matrices; the counts and spreads for SD1.5 are the spec's own figures.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perfusion.core.key_lock import Edit, edited
from perfusion.core.weight_offset import Offset, attention, check_fit, delta, fold, modulate, modulated, start

SHAPES = [(5, 7), (7, 5), (6, 6), (3, 8), (1, 1)]  # (d_out, d_in); below rank 3 as well
SD1 = {  # width: the blocks that have it
    320: ("input_blocks.1", "input_blocks.2", "output_blocks.9", "output_blocks.10", "output_blocks.11"),
    640: ("input_blocks.4", "input_blocks.5", "output_blocks.6", "output_blocks.7", "output_blocks.8"),
    1280: ("input_blocks.7", "input_blocks.8", "middle_block", "output_blocks.3", "output_blocks.4", "output_blocks.5"),
}


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


def untrained(d_out, d_in):
    """The same as PyTorch initialises it, which is how the public code starts."""
    with torch.random.fork_rng():
        torch.manual_seed(d_out + d_in)
        layers = {"1": (1, d_in), "2": (1, d_out), "_column": (d_in, d_in), "_row": (d_out, d_out)}
        layers = {name: nn.Linear(*size) for name, size in layers.items()}
    return {"v": torch.ones(1)} | {
        f"linear{name}.{kind}": t for name, layer in layers.items() for kind, t in layer.state_dict().items()
    }


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


class Cast(nn.Linear):
    """Keeps its weight in one dtype and computes in another, as a host does with 8-bit weights."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


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


# In place, and out again


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_module_with_an_offset_is_a_linear_layer_with_the_modulated_weight(shape, bias):
    module, x, t = linear(*shape, bias=bias), normal(2, 3, shape[1], seed=4), public(*shape)
    other = linear(*shape, bias=bias)
    other.weight.mul_(1 + published(t))
    with modulated({"to_q": module}, {"to_q": fold(t)}):
        close(module(x), other(x), 1e-11)


def test_the_factors_act_on_the_outside_of_the_weight():
    """y = Wx + Σ A ⊙ (W (C ⊙ x)): the spec's form that never builds Δ."""
    module, x, offset = linear(4, 6, bias=False), normal(3, 6, seed=4), offset_of(4, 6)
    C = torch.cat([offset.input, torch.ones(1, 6)])
    expected = module(x) + sum(a * module(c * x) for a, c in zip(offset.output, C, strict=True))
    with modulated({"to_q": module}, {"to_q": offset}):
        close(module(x), expected)


def test_the_offset_is_not_a_product_of_matrices_and_not_transposed():
    W, offset = linear(4, 4).weight, offset_of(4, 4)
    assert (modulate(W, offset) - (W + W @ delta(offset))).abs().max() > 0.1
    assert (modulate(W, offset) - W * (1 + delta(offset).T)).abs().max() > 0.1


def test_an_offset_is_not_lost_in_the_rounding_of_an_8_bit_weight():
    module, x = linear(9, 6, kind=Cast, dtype=torch.float8_e4m3fn), normal(4, 6, seed=7, dtype=torch.float32)
    offset = offset_of(9, 6, scale=1e-3, dtype=torch.float32)  # a hundredth of what 8 bits can tell apart
    exact = nn.functional.linear(x, module.weight.float() * (1 + delta(offset)), module.bias.float())
    plain = module(x)
    with modulated({"to_q": module}, {"to_q": offset}):
        close(module(x), exact, 1e-5)
    assert (exact - plain).abs().max() > 1e-3


def test_autocast_leaves_the_offset_in_full_precision():
    offset, W = offset_of(4, 6, dtype=torch.float32), linear(4, 6, dtype=torch.float32).weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(modulate(W, offset), W * (1 + delta(offset))) and modulate(W, offset).dtype == torch.float32
        inside = delta(offset)
    assert torch.equal(inside, delta(offset))


def test_modules_without_an_offset_answer_as_before():
    modules, x = {"to_q": linear(4, 5), "to_k": linear(4, 5)}, normal(3, 5)
    plain = modules["to_k"](x)
    with modulated(modules, {"to_q": offset_of(4, 5)}):
        assert torch.equal(modules["to_k"](x), plain) and not torch.equal(modules["to_q"](x), plain)


def snapshot(module):
    """Everything about a module that the block could have left behind."""
    return {**vars(module), "tensors": {n: (t, t.clone()) for n, t in module.named_parameters()},
            "slots": dict(module._parameters), "state": list(module.state_dict())}


def assert_is(module, before):
    after = snapshot(module)
    assert after.keys() == before.keys() and after["state"] == before["state"]
    for name, (tensor, copy) in after["tensors"].items():
        assert tensor is before["tensors"][name][0] and torch.equal(copy, before["tensors"][name][1])
    assert all(after["slots"][name] is before["slots"][name] for name in before["slots"])


def test_after_the_block_the_module_is_what_it_was_to_the_bit():
    module, x = linear(4, 5, dtype=torch.float32), normal(3, 5, dtype=torch.float32)
    before, plain = snapshot(module), module(x)
    with modulated({"to_q": module}, {"to_q": offset_of(4, 5, dtype=torch.float32)}):
        assert not torch.equal(module(x), plain)
        assert module.weight is before["slots"]["weight"]  # between calls as well
    assert_is(module, before)
    assert torch.equal(module(x), plain)


class Interrupted(nn.Linear):
    """Sees its weight modulated, and is stopped while it does."""

    def forward(self, x):
        if len(x) == 1:
            assert not isinstance(self.weight, nn.Parameter)
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("failure", ["between calls", "in a call", "in its input"])
def test_an_exception_leaves_the_modules_as_they_were(failure):
    module, x = linear(4, 5, kind=Interrupted), normal(3, 5)
    before = snapshot(module)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        with modulated({"to_q": module}, {"to_q": offset_of(4, 5)}):
            module(x)
            if failure == "between calls":
                raise KeyboardInterrupt
            module(x[:1] if failure == "in a call" else x[:, :3])
    assert_is(module, before)


def test_a_module_that_cannot_be_swapped_leaves_those_before_it_as_they_were():
    class Stuck(nn.Linear):
        def __setattr__(self, name, value):
            if name == "forward":
                raise RuntimeError("not this one")
            super().__setattr__(name, value)

    modules = {"a": linear(4, 5), "b": linear(4, 5, kind=Stuck)}
    before = {name: snapshot(module) for name, module in modules.items()}
    with pytest.raises(RuntimeError, match="not this one"):
        with modulated(modules, {name: offset_of(4, 5) for name in modules}):
            pass
    for name, module in modules.items():
        assert_is(module, before[name])


def test_a_forward_that_another_extension_put_there_is_used_and_put_back():
    module, x, offset = linear(4, 5, bias=False), normal(3, 5), offset_of(4, 5)
    up, down, plain = normal(4, 2, seed=1), normal(2, 5, seed=2), module.forward
    module.forward = theirs = lambda x: plain(x) + x @ down.T @ up.T  # a LoRA
    with modulated({"to_q": module}, {"to_q": offset}):
        close(module(x), x @ (modulate(module.weight, offset) + up @ down).T)
    assert module.forward is theirs


def test_offsets_of_two_domains_multiply_and_come_off_one_by_one():
    module, x, a, b = linear(4, 5), normal(3, 5), offset_of(4, 5, seed=1), offset_of(4, 5, seed=5)
    plain = module(x)
    with modulated({"to_q": module}, {"to_q": a}):
        outer = module(x)
        with modulated({"to_q": module}, {"to_q": b}):
            close(module(x), nn.functional.linear(x, modulate(modulate(module.weight, a), b), module.bias))
        assert torch.equal(module(x), outer)
    assert torch.equal(module(x), plain) and "forward" not in vars(module)


@pytest.mark.parametrize("name", ["to_k", "to_v"])
def test_a_concept_and_offsets_give_the_same_whichever_block_is_opened_first(name):
    module, x, offset = linear(4, 5, bias=False), normal(2, 3, 5), offset_of(4, 5)
    i, key_input, o, ones = normal(1, 5, seed=1), normal(1, 5, seed=2), normal(1, 4, seed=3), torch.ones(1, 1).double()
    edit = Edit(i, key_input, i / (i @ i.T), 0.7 * ones[0], 0.15 * ones[0], {"to_v": o}, ones, ones.expand(2, 1, 1))
    domain, concept = (lambda: modulated({name: module}, {name: offset})), (lambda: edited({name: module}, edit))
    keys, rest, g = edit(x)
    W = modulate(module.weight, offset)
    expected = keys @ W.T if name == "to_k" else rest @ W.T + g @ o
    for outer, inner in ((domain, concept), (concept, domain)):
        with outer(), inner():
            close(module(x), expected)
    assert "forward" not in vars(module)


# What bad input gets


@pytest.mark.parametrize("output, input, sentence", [
    ((3, 4), (2, 4), r"to_q has .* shape \(3, 4\) and \(2, 4\), and the model needs \(3, 4\) and \(2, 5\)\. Use"),
    ((3, 5), (2, 4), r"the model needs \(3, 4\) and \(2, 5\)"),
    ((2, 4), (2, 5), r"the model needs"),
    ((3, 4), (3, 5), r"the model needs"),
])
def test_an_offset_of_another_shape_gets_a_sentence_before_anything_is_touched(output, input, sentence):
    modules = {"to_k": linear(4, 5), "to_q": linear(4, 5)}
    offsets = {"to_k": offset_of(4, 5), "to_q": Offset(torch.zeros(output), torch.zeros(input))}
    with pytest.raises(ValueError, match=sentence):
        with modulated(modules, offsets):
            pass
    assert not any("forward" in vars(module) for module in modules.values())
    check_fit(modules, {"to_k": offsets["to_k"]})


def test_an_offset_of_a_weight_that_the_model_lacks_gets_a_sentence():
    with pytest.raises(ValueError, match="attn1.to_q has factors .* has no weight of that name. Use the base model"):
        check_fit({"attn2.to_q": linear(4, 5)}, {"attn1.to_q": offset_of(4, 5)})


@pytest.mark.parametrize("change, sentence", [
    ({"linear_row.weight": None}, r"linear_row\.weight should be \(5, 5\) and is absent"),
    ({"linear_column.weight": (5, 5)}, r"linear_column\.weight should be \(7, 7\) and is \(5, 5\)"),
    ({"extra": (2,)}, r"extra should be absent and is \(2,\)\. Give weight_offsets\.pt"),
    ({"v": ()}, r"v should be \(0,\) and is \(\)"),
    ({"linear1.bias": None}, r"linear1\.bias should be"),
])
def test_tensors_that_are_no_published_offset_get_a_sentence(change, sentence):
    t = public(5, 7) | {name: torch.zeros(shape) for name, shape in change.items() if shape is not None}
    t = {name: x for name, x in t.items() if change.get(name, ()) is not None}
    with pytest.raises(ValueError, match=sentence):
        fold(t)
