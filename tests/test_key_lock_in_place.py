"""The edit in a model's projections: which rows it reaches and how much, and that it comes out again."""

import pytest
import torch

from perfusion.core.key_lock import Edit, direction, edited, joint, overlap, subset

import edits
from edits import BIAS, TEMPERATURE, answers, close, edit_of, projection, single, tensor

three, world = edits.three, edits.world  # fixtures


# Which rows, how much


@pytest.mark.parametrize("j", [1, 2, 3, 4])
def test_the_table_solves_every_subset_and_leaves_the_others_out(j):
    r = torch.Generator().manual_seed(j)
    i = torch.randn(j, 6, generator=r, dtype=torch.float64)
    d = torch.stack([direction(torch.eye(6).double(), row)[0] for row in i])
    M = overlap(d, i)
    table = joint(M)
    assert table.shape == (2**j, j, j)
    s = torch.randn(j, generator=r, dtype=torch.float64)
    for members in torch.cartesian_prod(*[torch.arange(2)] * j).reshape(-1, j):
        inside = members.nonzero()[:, 0]
        c = table[subset(members[None])[0]] @ (s * members)
        close(c[inside], torch.linalg.solve(M[inside][:, inside], s[inside]), 1e-9)
        assert torch.equal(c[members == 0], torch.zeros(j - len(inside)).double())


def test_every_subset_has_an_index_of_its_own_whatever_the_weights():
    present = torch.cartesian_prod(*[torch.tensor([0.0, 1.3])] * 3)
    assert sorted(subset(present).tolist()) == list(range(8))
    assert torch.equal(subset(present), subset(-0.2 * present))


def test_a_row_is_edited_for_the_concepts_it_names_and_no_other(world):
    rows = [[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]]
    edit = edit_of(world["i"], world["o"], world["S"], BIAS, TEMPERATURE, present=rows)
    key, value = answers(edit, world["x"], world["W"])
    for row, named in enumerate(tensor(rows).bool()[:3]):
        pick = [world["i"][named], world["o"][named], world["S"], tensor(BIAS)[named], tensor(TEMPERATURE)[named]]
        alone = answers(edit_of(*pick), world["x"][row:row + 1], world["W"])
        close(key[row], alone[0][0], 1e-10)
        close(value[row], alone[1][0], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_row_that_names_no_concept_is_untouched_to_the_bit(world, three, dtype):
    edit = single(three)
    edit.present = torch.tensor([[1.0, 1, 1], [0, 0, 0], [0, 1.2, 0], [0, 0, 0]])
    x, weight = world["x"].to(dtype), world["W"].to(dtype)
    edit = edit if dtype != torch.float64 else Edit(
        **{name: getattr(three, name) for name in Edit.__dataclass_fields__} | {"present": edit.present.double()})
    plain = projection(weight)(x)
    for out in answers(edit, x, weight):
        assert torch.equal(out[1], plain[1]) and torch.equal(out[3], plain[3])
        assert not torch.equal(out[0], plain[0]) and not torch.equal(out[2], plain[2])


@pytest.mark.parametrize("weight", [0.5, 1.3, -0.4])
def test_what_a_concept_adds_grows_with_the_weight_of_its_word(world, weight):
    i, o, x, W = world["i"], world["o"], world["x"], world["W"]
    for present in ([1, 1, 1], [1, 0, 1]):
        once = edit_of(i, o, world["S"], BIAS, TEMPERATURE, present=[present])
        more = edit_of(i, o, world["S"], BIAS, TEMPERATURE, present=[[weight * p for p in present]])
        rest = once(x)[1]
        assert torch.equal(more(x)[1], rest)
        for a, b in zip(answers(more, x, W), answers(once, x, W), strict=True):
            close(a - rest @ W.T, weight * (b - rest @ W.T), 1e-10)


def test_keys_never_add_an_output(world, three):
    key, value = answers(three, world["x"], torch.zeros(5, 6).double())
    assert torch.equal(key, torch.zeros(4, 7, 5).double())
    close(value, three(world["x"])[2] @ world["o"], 1e-12)


def test_a_token_that_was_zeroed_out_is_left_alone_whatever_its_mark():
    i = torch.randn(1, 6, dtype=torch.float64)
    edit = Edit(i, i, i / (i @ i.T), torch.zeros(1).double(), torch.ones(1).double(), {}, torch.ones(1, 1).double(),
                torch.ones(2, 1, 1).double())
    x = torch.stack([torch.zeros(3, 6), torch.randn(3, 6)]).double()
    keys, values, g = edit(x)
    assert not keys[0].any() and not values[0].any() and not g[0].any()
    assert g[1].all()


def test_rows_that_the_marks_do_not_fit_get_a_sentence():
    i = torch.ones(1, 4)
    edit = Edit(i, i, i / 4, torch.zeros(1), torch.ones(1), {}, torch.ones(2, 1), torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match="3 rows of text where the prompts have 2"):
        edit(torch.randn(3, 5, 4))


# In place, and out again


def test_inside_the_block_projections_answer_as_edited_and_outside_as_before(world, three):
    key, value = projection(world["W"]), projection(world["W"])
    before, x = {n: t.clone() for n, t in value.state_dict().items()}, world["x"]
    plain = value(x)
    with edited({"to_k": key, "to_v": value}, three):
        assert not torch.equal(key(x), plain) and not torch.equal(value(x), plain)
        assert torch.equal(value.state_dict()["weight"], before["weight"]) and set(value.state_dict()) == set(before)
    assert torch.equal(key(x), plain) and torch.equal(value(x), plain)
    assert "forward" not in vars(key) and "forward" not in vars(value)


def test_an_exception_inside_the_block_leaves_the_projections_as_they_were(world, three):
    key, value = projection(world["W"]), projection(world["W"])
    with pytest.raises(RuntimeError, match="out of memory"):
        with edited({"to_k": key, "to_v": value}, three):
            key(world["x"])
            raise RuntimeError("out of memory")
    assert "forward" not in vars(key) and "forward" not in vars(value)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with edited({"to_k": key, "to_v": value}, three):
            value(world["x"][..., :5])  # fails in the edit itself
    assert "forward" not in vars(key) and "forward" not in vars(value)


def test_a_projection_that_cannot_be_swapped_leaves_those_before_it_as_they_were(world, three):
    key = projection(world["W"])
    with pytest.raises(AttributeError):
        with edited({"to_k": key, "to_v": object()}, three):
            pass
    assert "forward" not in vars(key)


def test_a_forward_that_another_extension_put_there_is_used_and_put_back(world, three):
    key, value, x = projection(world["W"]), projection(world["W"]), world["x"]

    def twice(module):
        plain = module.forward
        return lambda x: 2 * plain(x)

    key.forward, value.forward = twice(key), twice(value)
    theirs = key.forward, value.forward
    try:
        with edited({"to_k": key, "to_v": value}, three):
            keys, rest, g = three(x)
            close(key(x), 2 * keys @ world["W"].T, 1e-12)
            close(value(x), 2 * rest @ world["W"].T + g @ world["o"], 1e-12)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert (key.forward, value.forward) == theirs


def test_blocks_may_lie_inside_each_other(world, three):
    value, x = projection(world["W"]), world["x"]
    with edited({"to_v": value}, three):
        outer = value(x)
        with edited({"to_v": value}, single(three)):
            pass
        assert torch.equal(value(x), outer)
    assert "forward" not in vars(value)


def test_each_input_is_met_with_its_own_edit(world, three):
    """The edit is reused while the same tensor arrives; another tensor, and the first again, get their own."""
    value, x = projection(world["W"]), world["x"]
    first, second = answers(three, x, world["W"])[1], answers(three, x + 1, world["W"])[1]
    with edited({"to_v": value}, three) as of:
        assert of(x) is of(x)
        for _ in range(2):
            assert torch.equal(value(x), first)
            assert torch.equal(value(x + 1), second)
