"""Concepts that act for a part of the sampling: against the host's own ranges of conditioning, and strength 0. And the
global lock of keys: against the superclass prompt's own keys."""

from contextlib import contextmanager

import pytest
import torch

import nodes
from perfusion.core.acting import Acting, versions
from perfusion.core.prompt import PRESENT, WORDS

import applied
from applied import KINDS, TINY, apply, encode, near, off_by, projections, sample, swapped, textbook

pytestmark = pytest.mark.host

inference, world = applied.inference, applied.world  # fixtures
NEVER = Acting(0.6, 0.4)


def during(conditioning, start, end):
    """A conditioning that the host reads in this part of the sampling."""
    return nodes.ConditioningSetTimestepRange().set_range(conditioning, start, end)[0]


def acting(concept, *about, **more):
    return concept.replace(acting=Acting(*about, **more))


@contextmanager
def keys_of(w, conditioning, other, local=None):
    """While open, keys of a plain model are those of another prompt (n, d), edited by a concept's formula if given."""
    row, x = conditioning[0][0][0], other[0][0][0].double()
    if local:
        i, p = local.target_input.double(), w.inverse @ local.target_input.double()
        s = x @ p / (p @ i)
        g = torch.sigmoid((s - 0.30) / 0.10)
        x = x + local.strength * (g[:, None] * local.key_input.double() - s[:, None] * i)

    def answer(module, args, out):
        return torch.stack([(x @ module.weight.double().T).to(out) if torch.equal(given, row) else plain
                            for given, plain in zip(args[0], out)])

    hooks = [m.register_forward_hook(answer) for name, m in projections(w.model).items() if name.endswith("to_k")]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_the_versions_are_those_of_some_time_and_come_in_one_order():
    a, b = frozenset("a"), frozenset("b")
    assert versions({"a": Acting()}) == (frozenset(),)
    assert versions({"a": Acting(0.0, 0.5), "b": Acting()}) == (frozenset(), a)
    assert versions({"a": Acting(0.0, 0.5), "b": Acting(0.5, 1.0)}) == (frozenset(), a, b)
    assert versions({"b": Acting(0.6, 1.0), "a": Acting(0.0, 0.5)}) == (frozenset(), a, a | b, b)
    assert versions({"a": NEVER, "b": NEVER}) == (frozenset(), a | b)
    assert versions({"a": Acting(lock="global"), "b": Acting()}) == (frozenset(), a)
    assert versions({"a": Acting(lock="global"), "b": Acting(0.5)}) == (frozenset(), a, a | b, b)


@pytest.mark.parametrize("kind", KINDS)
def test_from_0_to_1_is_the_concept_bit_for_bit_and_its_prompts_carry_nothing_more(world, kind):
    w = world(kind)
    pictures = []
    for concept in w.cat, acting(w.cat, 0.0, 1.0):
        model, clip = apply(w, concept)
        positive, negative = encode(clip, "a <mimi>, red"), encode(clip, "blurry")
        assert set(positive[0][1]["model_conds"]) == {WORDS, PRESENT}
        pictures.append(sample(model, positive, negative))
    assert torch.equal(*pictures)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_never_opens_is_strength_0(world, kind):
    w = world(kind)
    model, clip = apply(w, w.cat.replace(acting=NEVER))
    picture = sample(model, encode(clip, "a (<mimi>:1.2), red"), encode(clip, "blurry"))
    assert torch.equal(picture, sample(w.model, encode(w.clip, "a (cat:1.2), red"), encode(w.clip, "blurry")))
    both, clip = apply(w, w.dog, w.cat.replace(acting=NEVER))
    one, plain = apply(w, w.dog)
    picture = sample(both, encode(clip, "<rex> and <mimi>"), encode(clip, ""))
    assert near(picture, sample(one, encode(plain, "<rex> and cat"), encode(plain, "")))
    assert swapped(w.model) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_is_what_the_hosts_own_ranges_of_conditioning_give(world, kind):
    w = world(kind)
    model, clip = apply(w, acting(w.cat, 0.25, 0.7))
    picture = sample(model, encode(clip, "a <mimi>, red"), encode(clip, "blurry"), steps=6)
    model, clip = apply(w, w.cat)
    word, plain = encode(clip, "a <mimi>, red"), encode(clip, "a cat, red")
    ranges = [*during(plain, 0, 0.25), *during(word, 0.25, 0.7), *during(plain, 0.7, 1)]
    assert near(picture, sample(model, ranges, encode(clip, "blurry"), steps=6), 1e-6)
    assert not near(picture, sample(model, word, encode(clip, "blurry"), steps=6), 1e-3)


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_each_of_two_concepts_has_a_window_of_its_own_in_any_order(world, kind):
    w = world(kind)
    pictures = []
    for order in ((w.cat, 0.0, 0.7), (w.dog, 0.3, 1.0)), ((w.dog, 0.3, 1.0), (w.cat, 0.0, 0.7)):
        model, clip = apply(w, *(acting(*about) for about in order))
        pictures.append(sample(model, encode(clip, "<mimi> and a <rex>"), encode(clip, ""), steps=6))
    model, clip = apply(w, w.cat, w.dog)
    first, both, last = (encode(clip, p) for p in ("<mimi> and a dog", "<mimi> and a <rex>", "cat and a <rex>"))
    ranges = [*during(first, 0, 0.3), *during(both, 0.3, 0.7), *during(last, 0.7, 1)]
    expected = sample(model, ranges, encode(clip, ""), steps=6)
    assert all(near(picture, expected) for picture in pictures)
    assert not near(sample(model, both, encode(clip, ""), steps=6), expected, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_the_word_are_untouched_at_any_time(world, kind):
    w = world(kind)
    model, clip = apply(w, acting(w.cat, 0.3, 0.6))
    marked, plain = ([encode(c, prompt) for prompt in ("a photo of a cat", "blurry")] for c in (clip, w.clip))
    base = sample(w.model, *plain, steps=4)
    assert torch.equal(sample(model, *marked, steps=4), base)
    assert near(sample(model, marked[0], plain[1], steps=4), base)


def test_a_long_prompt_is_given_back_in_every_chunk_beside_a_short_one(world):
    w = world()
    model, clip = apply(w, w.cat.replace(acting=NEVER))
    long = " ".join(["tree"] * 90)
    picture = sample(model, encode(clip, f"<mimi> {long} <mimi>"), encode(clip, "a <mimi>"))
    assert torch.equal(picture, sample(w.model, encode(w.clip, f"cat {long} cat"), encode(w.clip, "a cat")))


def test_a_prompt_that_another_node_has_changed_is_read_as_it_comes(world):
    w = world()
    model, clip = apply(w, w.cat.replace(acting=NEVER))
    word, snow, negative = (encode(clip, prompt) for prompt in ("a <mimi>", "snow", ""))
    mixed, = nodes.ConditioningAverage().addWeighted(word, snow, 0.7)
    zero, = nodes.ConditioningZeroOut().zero_out(word)
    for changed in mixed, zero:
        assert torch.equal(sample(model, changed, negative), sample(w.model, changed, negative))


def test_a_prompt_that_another_node_has_lengthened_gets_a_sentence(world):
    w = world()
    model, clip = apply(w, w.cat.replace(acting=NEVER))
    joined, = nodes.ConditioningConcat().concat(encode(clip, "a <mimi>"), encode(clip, "snow"))
    with pytest.raises(ValueError, match="154 tokens of text in 2 rows where the prompts have 77 in 2.* in one piece"):
        sample(model, joined, encode(clip, ""))
    assert swapped(w.model) == []


def test_prompts_of_another_gate_strength_than_the_models_get_a_sentence(world):
    w = world()
    (model, _), (_, clip) = apply(w, w.cat.replace(acting=NEVER)), apply(w, w.cat)
    with pytest.raises(ValueError, match="<mimi> should be given back .* Connect MODEL and CLIP"):
        sample(model, encode(clip, "a <mimi>"), encode(clip, ""))


# The global lock


@pytest.mark.parametrize("kind", KINDS)
def test_under_a_global_lock_keys_are_the_superclass_prompts_and_values_the_textbooks(world, kind):
    w = world(kind)
    model, clip = apply(w, acting(w.cat, lock="global"))
    positive, negative = encode(clip, "a (<mimi>:1.2) in the snow"), encode(clip, "blurry")
    edited, base = sample(model, positive, negative), sample(w.model, positive, negative)
    with textbook(w, [w.cat], [(positive, (1.2,))]):
        local = sample(w.model, positive, negative)
        with keys_of(w, positive, encode(w.clip, "a (cat:1.2) in the snow")):
            expected = sample(w.model, positive, negative)
    assert off_by(edited, expected, of=base) < TINY
    assert not near(local, expected, 1e-3)


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_beside_a_global_lock_a_local_one_edits_the_keys_of_what_is_left(world, kind):
    w = world(kind)
    pictures = []
    for order in (acting(w.cat, lock="global"), w.dog), (w.dog, acting(w.cat, lock="global")):
        model, clip = apply(w, *order)
        positive, negative = encode(clip, "<mimi> and a <rex>"), encode(clip, "")
        pictures.append(sample(model, positive, negative))
    with textbook(w, [w.cat, w.dog], [(positive, (1.0, 1.0))]):
        with keys_of(w, positive, encode(clip, "cat and a <rex>"), local=w.dog):
            expected = sample(w.model, positive, negative)
    base = sample(w.model, positive, negative)
    assert all(off_by(picture, expected, of=base) < TINY for picture in pictures)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_the_word_are_untouched_under_a_global_lock(world, kind):
    w = world(kind)
    model, clip = apply(w, acting(w.cat, lock="global"))
    marked, plain = ([encode(c, prompt) for prompt in ("a photo of a cat", "blurry")] for c in (clip, w.clip))
    assert torch.equal(sample(model, *marked), sample(w.model, *plain))


def test_a_global_lock_holds_for_the_part_of_sampling_in_which_its_concept_acts(world):
    w = world()
    model, clip = apply(w, acting(w.cat, 0.25, 0.7, "global"))
    picture = sample(model, encode(clip, "a <mimi>, red"), encode(clip, "blurry"), steps=6)
    model, clip = apply(w, acting(w.cat, lock="global"))
    word, plain = encode(clip, "a <mimi>, red"), encode(clip, "a cat, red")
    ranges = [*during(plain, 0, 0.25), *during(word, 0.25, 0.7), *during(plain, 0.7, 1)]
    assert near(picture, sample(model, ranges, encode(clip, "blurry"), steps=6), 1e-6)


def test_a_prompt_that_another_node_has_changed_is_locked_locally(world):
    w = world()
    pictures = []
    for lock in "local", "global":
        model, clip = apply(w, acting(w.cat, lock=lock))
        mixed, = nodes.ConditioningAverage().addWeighted(encode(clip, "a <mimi>"), encode(clip, "snow"), 0.7)
        pictures.append(sample(model, mixed, encode(clip, "")))
    assert torch.equal(*pictures)
