"""Gate Sweep: its list of strengths, and that each item of it is what Gate Strength and Apply give."""

import pytest
import torch

from perfusion.core.sweep import MOST, strengths_in, sweep

import applied
from applied import apply, encode, sample

pytestmark = pytest.mark.host

inference, world = applied.inference, applied.world  # fixtures


@pytest.mark.parametrize("text, strengths", [
    ("0, .25, .5, .75, 1", [0, 0.25, 0.5, 0.75, 1]),
    (" 1,0.0 ,1. ", [1, 0, 1]),
    ("0-1 [5]", [0, 0.25, 0.5, 0.75, 1]),
    ("0-1 (+.25)", [0, 0.25, 0.5, 0.75, 1]),
    ("0 - .3(+.1), .9", [0, 0.1, 0.2, 0.3, 0.9]),
    (".2-.9(+0.3)", [0.2, 0.5, 0.8]),
    (".1-.7[3]", [0.1, 0.4, 0.7]),
])
def test_strengths_are_numbers_and_ranges_in_their_order(text, strengths):
    assert strengths_in(text) == strengths


@pytest.mark.parametrize("text, words", [
    ("", "'' is no strength. Write numbers from 0 to 1"),
    ("0, , 1", "'' is no strength"),
    ("0; 1", "'0; 1' is no strength"),
    ("half", "'half' is no strength"),
    ("-.5, 1", "'-.5' is no strength"),
    ("nan", "'nan' is no strength"),
    ("0-1", "'0-1' is no strength. Write numbers from 0 to 1 with commas between them, such as 0, .25"),
    ("0, 1.5", "A strength lies in 0 to 1; '0, 1.5' holds 1.5"),
    ("0-5 [3]", "holds 2.5"),
    ("1-0 [3]", "range '1-0 [3]' should go up"),
    ("0-1 [1]", "range '0-1 [1]' should go up and hold two"),
    ("0-1 (+0)", "range '0-1 (+0)' should go up"),
    ("0-1 (+.000000001)", "would make 1000000001 pictures; it may make 64"),
    ("0-1 [99999999999]", "would make 99999999999 pictures"),
])
def test_what_is_no_list_of_strengths_gets_a_sentence(text, words):
    with pytest.raises(ValueError) as caught:
        strengths_in(text)
    assert words in str(caught.value)


def test_a_sweep_of_more_pictures_than_anyone_looks_at_is_refused(world):
    w = world()
    with pytest.raises(ValueError, match=f"would make {MOST + 1} pictures; it may make {MOST}"):
        sweep(w.model, w.clip, w.cat, ", ".join(["1"] * (MOST + 1)), None, "")
    with pytest.raises(ValueError, match="would make 66 pictures"):
        sweep(w.model, w.clip, w.cat, "0-1 [11]", w.dog, "0-1 [6]")
    assert len(sweep(w.model, w.clip, w.cat, "0-1 [8]", w.dog, "0-1 [8]")[2]) == MOST


def picture(model, clip, prompt):
    return sample(model, encode(clip, prompt), encode(clip, ""))


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_each_item_is_what_gate_strength_and_apply_give(world, pack, kind):
    w, dial = world(kind), pack["PerfusionGateStrength"].execute
    raw = w.cat.raw(0.2, 0.3)  # is replaced
    models, clips, labels = pack["PerfusionGateSweep"].execute(w.model, w.clip, raw, "0, .3, 1").result
    assert labels == ["<mimi> 0", "<mimi> .3", "<mimi> 1"]
    made = [picture(model, clip, "a <mimi>, red") for model, clip in zip(models, clips, strict=True)]
    for came, strength in zip(made, (0, 0.3, 1), strict=True):
        model, clip = apply(w, dial(w.cat, strength, "slider", 0.0, 0.1).result[0])
        assert torch.equal(came, picture(model, clip, "a <mimi>, red"))
    assert torch.equal(made[0], picture(w.model, w.clip, "a cat, red"))
    assert not torch.equal(made[1], made[2])


def test_two_concepts_make_rows_and_columns(world):
    w = world()
    models, clips, labels = sweep(w.model, w.clip, w.cat, "0, .5, 1", w.dog, ".05, 1")
    assert labels == ["<mimi> 0 · <rex> .05", "<mimi> .5 · <rex> .05", "<mimi> 1 · <rex> .05",
                      "<mimi> 0 · <rex> 1", "<mimi> .5 · <rex> 1", "<mimi> 1 · <rex> 1"]
    prompt = "<rex> and <mimi>"
    model, clip = apply(w, w.cat.at(0.5).kept_apart(True), w.dog.at(1).kept_apart(True))
    assert torch.equal(picture(models[4], clips[4], prompt), picture(model, clip, prompt))
    model, clip = apply(w, w.dog.at(1))
    assert torch.equal(picture(models[3], clips[3], prompt), picture(model, clip, "<rex> and cat"))
