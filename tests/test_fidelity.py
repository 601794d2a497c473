"""The fidelity curve: what likeness and obedience are at their ends, where the knee is, and the file that keeps it."""

import json

import pytest
import torch

from perfusion.core.concept import dump, embed, parse, unpack
from perfusion.core.fidelity import KEPT, MOST, PROMPTS, Curve, dumped, likeness, obedience, parsed, prompts_in, rising
from perfusion.core.file import pack, unpacked

from concepts import learnt, metadata_of

FIVE = (0.0, 0.25, 0.5, 0.75, 1.0)


def curve(likeness=(0, 0.2, 0.4, 0.5, 0.55), obedience=(1, 0.95, 0.9, 0.85, 0.6), strengths=FIVE, **changes):
    return Curve(**{"strengths": strengths, "likeness": tuple(map(float, likeness)), "seed": 3, "tower": "a" * 64,
                    "obedience": tuple(map(float, obedience)), "prompts": PROMPTS} | changes)


# The two lines


def answers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_likeness_is_0_at_strength_0_and_1_where_each_picture_is_the_photo():
    photo, made = answers(1, 16), answers(3, 4, 16, seed=1)
    made[2] = 7 * photo  # a tower's answer has no length that counts
    found = likeness(made, photo)
    assert found[0] == 0 and found[2].item() == pytest.approx(1, abs=1e-5) and found[1] < 0.9


def test_likeness_grows_on_the_way_from_the_plain_model_to_the_photo():
    photo, plain = answers(2, 16), answers(3, 16, seed=1)
    way = torch.stack([plain.lerp(photo[:1].expand_as(plain), s) for s in FIVE])
    assert likeness(way, photo).diff().min() > 0


def test_obedience_is_1_for_the_plain_models_picture_and_0_for_that_of_any_other_prompt():
    plain = answers(4, 16)
    others = torch.stack([plain[[q for q in range(4) if q != p]] for p in range(4)])  # p, three others, w
    for k in range(3):
        swapped = others[:, k]
        assert obedience(torch.stack([plain, plain]))[1].item() == pytest.approx(1, abs=1e-5)
        assert obedience(torch.stack([plain, swapped]))[1] < 0.4
    each = torch.stack([obedience(torch.stack([plain, others[:, k]]))[1] for k in range(3)])
    assert each.mean().item() == pytest.approx(0, abs=1e-5)


def test_obedience_falls_as_all_prompts_give_one_picture():
    plain = answers(4, 16)
    one = torch.stack([plain.lerp(plain.mean(0).expand_as(plain), s) for s in FIVE])
    assert obedience(one).diff().max() < 0


# The knee


@pytest.mark.parametrize("knee", (0.25, 0.4, 0.66, 0.9, 1.0))
def test_on_a_straight_line_the_knee_is_where_the_prompt_has_its_due_left_whichever_strengths_are_drawn(knee):
    for drawn in FIVE, (0.0, 0.1, 0.2, 1.0), (0.0, 1.0):
        straight = curve([0.4 * s for s in drawn], [1 - (1 - KEPT) * s / knee for s in drawn], drawn)
        assert straight.knee == max(knee, drawn[1])


def test_what_loses_more_of_the_prompt_has_a_knee_that_is_no_higher():
    knees = [curve(obedience=[1 - loss * s**power for s in FIVE]).knee
             for power in (2, 1, 0.5) for loss in (0.3, 0.5, 0.7, 0.9)]
    for k in range(0, 12, 4):
        assert knees[k : k + 4] == sorted(knees[k : k + 4], reverse=True) and knees[k] == 1 > knees[k + 3]
    assert curve(obedience=(1, 0.5, 0.9, 0.9, 0.9)).knee == 0.25  # the first fall counts
    assert curve(obedience=(0.5, 0.5, 0.5, 0.5, 0.5)).knee == 0.25


def test_more_strength_that_is_no_more_likeness_is_not_taken():
    assert curve(likeness=(0, 0.2, 0.5, 0.4, 0.3), obedience=(1, 1, 1, 1, 1)).knee == 0.5


def test_what_costs_nothing_is_taken_whole_and_what_gives_nothing_is_left_at_the_lowest():
    assert curve(obedience=(1, 1, 1, 1, 1)).knee == 1
    assert curve(likeness=(0, 0, 0, 0, 0)).knee == 0.25


def test_the_knee_is_never_0_where_there_is_no_concept_and_of_two_equals_the_lower():
    assert curve(likeness=(0, -1, -2, -3, -4), obedience=(1, 0.1, 0, 0, 0)).knee == 0.25
    assert curve(likeness=(0, 0.9, 1, 1, 1), obedience=(1, 0.1, 0, 0, 0)).knee == 0.25
    assert curve(likeness=(0, 0.2, 0.5, 0.5, 0.5), obedience=(1, 1.1, 1, 1, 1)).knee == 0.5
    assert curve((0, 0.1), (1, 0.2), (0.0, 0.4)).knee == 0.4


# What is asked for


def test_prompts_are_lines_and_each_once():
    assert prompts_in("a {} here\n\n  {} there \na {} here\n") == ("a {} here", "{} there")
    assert prompts_in("\n".join(PROMPTS)) == PROMPTS


@pytest.mark.parametrize("text, words", [
    ("", "needs two different prompts or more, one on a line, and 0 came"),
    ("a {} here\na {} here", "and 1 came"),
    ("a {} here\na cat there", "Each prompt has to hold {} where the concept's word goes, .*; got 'a cat there'"),
])
def test_prompts_that_nothing_can_be_measured_with_get_a_sentence(text, words):
    with pytest.raises(ValueError, match=words):
        prompts_in(text)


def test_strengths_come_in_order_and_each_once():
    assert rising([1, 0, 0.5, 0.5], 3) == (0, 0.5, 1)


@pytest.mark.parametrize("strengths, prompts, words", [
    ([0.25, 1], 3, "begin at 0, the plain model that the others are measured against, and go on .*; got 0.25, 1"),
    ([0, 0], 3, "begin at 0.*; got 0"),
    ([k / 21 for k in range(22)], 3, f"22 strengths of 3 prompts are 66 pictures; it may be {MOST}"),
])
def test_strengths_that_no_curve_can_be_drawn_through_get_a_sentence(strengths, prompts, words):
    with pytest.raises(ValueError, match=words):
        rising(strengths, prompts)


# The file


@pytest.mark.parametrize("precision", ("fp16", "int8"))
def test_a_curve_comes_back_from_the_file_and_from_a_workflow(precision):
    concept = learnt("sd1", fidelity=curve(prompts=("a {} 雪", 'a "{}"\n')), strength=0.75, precision=precision)
    assert parse(dump(concept), "mimi").fidelity == concept.fidelity == unpack(*embed(concept)).fidelity
    assert dump(parse(dump(concept), "mimi")) == dump(concept)
    assert concept.at(0.3).raw(0.4, 0.2).fidelity == concept.fidelity  # it is of the concept, not of its dial


def test_a_concept_that_nothing_was_measured_of_has_the_file_that_it_had():
    assert "fidelity" not in metadata_of(dump(learnt())) and parse(dump(learnt()), "mimi").fidelity is None
    measured = dump(learnt(fidelity=curve()))
    tensors, metadata = unpacked(measured, "mimi", "")
    del metadata["fidelity"]
    assert pack(tensors, metadata) == dump(learnt())


@pytest.mark.parametrize("change", [
    {"strengths": [0, 0.5]}, {"strengths": [0.25, 0.5, 0.6, 0.75, 1]}, {"strengths": [0, 0.5, 0.25, 0.75, 1]},
    {"strengths": [0, 0.25, 0.5, 0.75, 2]}, {"likeness": [0, 1, 2, 3, float("nan")]}, {"likeness": None},
    {"obedience": [1, 1, 1, 1, 10**400]}, {"seed": "x"}, {"prompts": 3}, {"strengths": [], "likeness": [],
                                                                          "obedience": []},
])
def test_a_damaged_curve_is_refused_with_a_sentence(change):
    text = json.dumps(json.loads(dumped(curve())) | change)
    tensors, metadata = unpacked(dump(learnt()), "mimi", "")
    with pytest.raises(ValueError, match="facts stored in 'mimi' are damaged .*Load another file"):
        parse(pack(tensors, metadata | {"fidelity": text}), "mimi")
    for text in ("", "[]", "7", "{}", "[" * 100_000):
        with pytest.raises(ValueError, match="are damaged"):
            parse(pack(tensors, metadata | {"fidelity": text}), "mimi")


def test_a_curve_is_small_beside_its_concept():
    assert parsed(dumped(curve())) == curve()
    assert len(dump(learnt("sd1", fidelity=curve()))) - len(dump(learnt("sd1"))) < 1024
