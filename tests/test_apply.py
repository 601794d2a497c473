"""Concepts on a ComfyUI model, one and several: against the textbook formula, and that nothing else changes."""

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from perfusion.core import apply as applying
from perfusion.core.prompt import words_of

import applied
from applied import KINDS, PLACES, TINY, apply, encode, near, off_by, projections, sample, swapped, textbook

pytestmark = pytest.mark.host

inference, world = applied.inference, applied.world  # fixtures


# The edit


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_found_in_every_family(world, kind):
    names = list(projections(world(kind).model))
    keys, values = ({n[:-1] for n in names if n.endswith(end)} for end in ("attn2.to_k", "attn2.to_v"))
    assert len(names) == PLACES[kind] and len(set(names)) == len(names)
    assert keys == values and len(keys) * 2 == len(names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt, weight", [("a photo of <mimi>, red", 1.0), ("a (<mimi>:1.2) in the grass", 1.2)])
def test_the_edit_is_the_textbook_formula(world, kind, prompt, weight):
    w = world(kind)
    model, clip = apply(w, w.cat)
    positive, negative = encode(clip, prompt), encode(clip, "blurry")
    edited = sample(model, positive, negative, steps=3, batch=2)
    base = sample(w.model, positive, negative, steps=3, batch=2)
    with textbook(w, [w.cat], [(positive, (weight,))]):
        expected = sample(w.model, positive, negative, steps=3, batch=2)
    assert off_by(edited, expected, of=base) < TINY
    assert off_by(base, expected, of=torch.zeros_like(base)) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_several_concepts_in_one_prompt_are_the_textbook_formula(world, kind):
    w = world(kind)
    concepts = [w.cat, w.dog, w.toy]
    model, clip = apply(w, *concepts)
    positive, negative = encode(clip, "<rex> and (<mimi>:0.8), red"), encode(clip, "a <bot>")
    named = [(positive, (0.8, 1.0, 0.0)), (negative, (0.0, 0.0, 1.0))]
    edited = sample(model, positive, negative)
    with textbook(w, concepts, named):
        expected = sample(w.model, positive, negative)
    assert off_by(edited, expected, of=sample(w.model, positive, negative)) < TINY
    everyone = encode(clip, "<rex>, <bot> and <mimi>")
    edited = sample(model, everyone, negative)
    with textbook(w, concepts, [(everyone, (1.0, 1.0, 1.0)), named[1]]):
        expected = sample(w.model, everyone, negative)
    assert off_by(edited, expected, of=sample(w.model, everyone, negative)) < TINY


def test_each_of_several_positives_is_edited_by_its_own_words(world):
    w = world()
    model, clip = apply(w, w.cat, w.dog)
    both = [encode(clip, prompt) for prompt in ("a <mimi>, red", "a green tree", "a <rex>")]
    positive, negative = [c for cond in both for c in cond], encode(clip, "")
    edited = sample(model, positive, negative)
    base = sample(w.model, positive, negative)
    with textbook(w, [w.cat, w.dog], [(both[0], (1.0, 0.0)), (both[2], (0.0, 1.0))]):
        assert off_by(edited, sample(w.model, positive, negative), of=base) < TINY


def test_the_word_in_the_second_chunk_of_a_long_prompt_is_edited(world):
    w = world()
    model, clip = apply(w, w.cat)
    long = " ".join(["tree"] * 90)
    positive, negative = encode(clip, long + " <mimi>"), encode(clip, long)
    edited, base = sample(model, positive, negative), sample(w.model, positive, negative)
    with textbook(w, [w.cat], [(positive, (1.0,))]):
        assert off_by(edited, sample(w.model, positive, negative), of=base) < TINY


def test_the_strength_moves_the_gate(world):
    w = world()
    pictures = []
    for strength in (0.1, 0.5, 1.0):
        concept = w.cat.replace(strength=strength)
        model, clip = apply(w, concept)
        positive, negative = encode(clip, "<mimi>"), encode(clip, "")
        pictures.append(sample(model, positive, negative))
        with textbook(w, [concept], [(positive, (1.0,))]):
            assert near(pictures[-1], sample(w.model, positive, negative))
    assert not any(near(a, b, 1e-3) for a, b in zip(pictures, pictures[1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_dial_begins_at_the_base_model_without_a_jump(world, kind):
    w = world(kind)
    base = sample(w.model, encode(w.clip, "a cat, red"), encode(w.clip, ""))
    moved = []
    for strength in (0.002, 0.004, 1.0):
        model, clip = apply(w, w.cat.at(strength))
        moved.append((sample(model, encode(clip, "a <mimi>, red"), encode(clip, "")) - base).norm() / base.norm())
    assert moved[0] < 0.02 * moved[2] and moved[1] < 0.04 * moved[2]
    assert 1.5 < moved[1] / moved[0] < 2.5


# Nothing else changes


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model_is_bit_for_bit_what_it_was(world, kind):
    w = world(kind)
    weights = {name: t.clone() for name, t in w.model.model.state_dict().items()}
    model, clip = apply(w, w.cat)
    plain, words = (encode(w.clip, "a cat"), encode(w.clip, "")), (encode(clip, "a <mimi>"), encode(clip, ""))
    base = sample(w.model, *plain)
    edited = sample(model, *words)
    assert torch.equal(sample(w.model, *plain), base)
    assert torch.equal(sample(model, *words), edited) and not torch.equal(edited, base)
    assert torch.equal(sample(w.model, *plain), base)
    comfy.model_management.unload_all_models()
    after = w.model.model.state_dict()
    assert swapped(w.model) == [] and weights.keys() == after.keys()
    assert all(torch.equal(t, after[name]) for name, t in weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_the_base_model_with_the_superclass_word(world, kind):
    w = world(kind)
    model, clip = apply(w, w.cat.replace(strength=0.0))
    picture = sample(model, encode(clip, "a <mimi>, red"), encode(clip, ""))
    assert torch.equal(picture, sample(w.model, encode(w.clip, "a cat, red"), encode(w.clip, "")))
    both, clip = apply(w, w.dog, w.cat.replace(strength=0.0))
    one, plain = apply(w, w.dog)
    picture = sample(both, encode(clip, "<rex> and <mimi>"), encode(clip, ""))
    assert torch.equal(picture, sample(one, encode(plain, "<rex> and cat"), encode(plain, "")))


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, comfy.model_management.InterruptProcessingException, Stop])
@pytest.mark.parametrize("where", ["attn2 patch", "wrapper inside", "wrapper outside"])
def test_an_error_inside_the_call_leaves_the_base_model_bit_for_bit(world, error, where):
    w = world()
    weights = {name: t.clone() for name, t in w.model.model.state_dict().items()}
    plain = encode(w.clip, "a cat"), encode(w.clip, "")
    base = sample(w.model, *plain)
    calls, seen = [], []

    def fail():
        calls.append(1)
        seen.append(len(swapped(w.model)))
        if len(calls) == 6:
            raise error()

    def patch(n, k, v, options):
        fail()
        return n, k, v

    def wrapper(executor, *args, **kwargs):
        fail()
        answer = executor(*args, **kwargs)
        fail()
        return answer

    model, clip = w.model.clone(), w.clip
    if where == "wrapper outside":
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", wrapper)
    model, clip = apply(w, w.cat, model=model)
    if where == "attn2 patch":
        model.set_model_attn2_patch(patch)
    elif where == "wrapper inside":
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", wrapper)
    with pytest.raises(error):
        sample(model, encode(clip, "a <mimi>"), encode(clip, ""), steps=3)
    assert set(seen) == ({0} if where == "wrapper outside" else {PLACES["sd1"]})
    assert swapped(w.model) == []
    assert torch.equal(sample(w.model, *plain), base)
    after = w.model.model.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_the_word_are_untouched(world, kind):
    w = world(kind)
    model, clip = apply(w, w.cat)
    prompts = "a photo of a cat", "blurry"
    marked, plain = ([encode(c, prompt) for prompt in prompts] for c in (clip, w.clip))
    base = sample(w.model, *plain)
    assert torch.equal(sample(model, *marked), base)
    assert torch.equal(sample(model, *plain), base)
    assert near(sample(model, marked[0], plain[1]), base)  # one has a mark and one has none: the host runs them apart


def test_a_negative_from_another_clip_counts_as_without_the_word(world):
    w = world()
    model, clip = apply(w, w.cat)
    positive = encode(clip, "a <mimi>")
    pictures = [sample(model, positive, encode(c, "blurry")) for c in (clip, w.clip)]
    assert near(*pictures)


@pytest.mark.parametrize("kind", KINDS)
def test_edit_negative_edits_every_row(world, kind):
    w = world(kind)
    model, clip = apply(w, w.cat, edit_negative=True)
    cat, blurry = encode(clip, "a cat"), encode(clip, "blurry")
    base, edited = sample(w.model, cat, blurry), sample(model, cat, blurry)
    assert not near(edited, base, 1e-3)
    with textbook(w, [w.cat], [(cat, (1.0,)), (blurry, (1.0,))]):
        assert near(edited, sample(w.model, cat, blurry))
    later, _ = apply(w, w.dog, model=model, clip=clip)
    wrapper, = later.get_wrappers(WrappersMP.APPLY_MODEL, applying.KEY)
    assert wrapper.edit_negative


# Several concepts


def test_applying_twice_makes_one_wrapper_and_leaves_the_first_model_alone(world):
    w = world()
    one, clip = apply(w, w.cat)
    two, both = apply(w, w.dog, model=one, clip=clip)
    assert [applying.applied(m) for m in (w.model, one, two)] == [(), (w.cat,), (w.cat, w.dog)]
    assert [list(words_of(c)) for c in (w.clip, clip, both)] == [[], ["<mimi>"], ["<mimi>", "<rex>"]]
    assert len(two.get_wrappers(WrappersMP.APPLY_MODEL, applying.KEY)) == 1


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_the_order_of_concepts_does_not_matter(world, kind):
    w = world(kind)
    concepts = [w.cat, w.dog, w.toy]
    pictures = []
    for order in (concepts, concepts[::-1], [w.dog, w.cat, w.toy]):
        model, clip = apply(w, *order)
        pictures.append(sample(model, encode(clip, "<mimi>, a <rex> and <bot>"), encode(clip, "")))
        pictures.append(sample(apply(w, *concepts)[0], encode(clip, "<mimi>, a <rex> and <bot>"), encode(clip, "")))
    assert all(near(picture, pictures[0]) for picture in pictures[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_concept_named_alone_is_as_if_it_had_been_applied_alone(world, kind):
    w = world(kind)
    everyone, clip = apply(w, w.cat, w.dog, w.toy)
    for concept in (w.cat, w.dog, w.toy):
        alone, own = apply(w, concept)
        prompt = f"a photo of {concept.word}, red"
        picture = sample(alone, encode(own, prompt), encode(own, ""))
        assert near(sample(everyone, encode(clip, prompt), encode(clip, "")), picture)
        assert near(sample(alone, encode(clip, prompt), encode(clip, "")), picture)
        assert not near(sample(w.model, encode(clip, prompt), encode(clip, "")), picture, 0.01)
