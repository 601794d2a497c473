"""Weight offsets in a model that has to be left as it was, and what bad ones get."""

import pytest
import torch
from torch import nn

from perfusion.core.key_lock import Edit, edited
from perfusion.core.weight_offset import Offset, check_fit, delta, fold, modulate, modulated

from offsets import SHAPES, Cast, close, linear, normal, offset_of, public, published

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
