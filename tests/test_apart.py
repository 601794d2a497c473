"""Concepts that are kept apart: whose each place is, against attention recomputed, and whole pictures in the host."""

import comfy.controlnet
import pytest
import torch
from comfy.patcher_extension import WrappersMP

import nodes
from perfusion.core.acting import Acting, versions
from perfusion.core.apart import members, split, weights
from perfusion.core.prompt import PLACES

import applied
from applied import KINDS, apply, encode, near, sample, swapped

pytestmark = pytest.mark.host

inference, world = applied.inference, applied.world  # fixtures
A, B, AB, NONE, APART = frozenset("a"), frozenset("b"), frozenset("ab"), frozenset(), Acting(apart=True)
BOTH = "a <mimi> beside a <rex>"


def kept(*concepts):
    return [concept.kept_apart(True) for concept in concepts]


def pictures(w, *concepts, prompt=BOTH, model=None, **options):
    model, clip = apply(w, *concepts, model=model)
    return sample(model, encode(clip, prompt), encode(clip, "blurry"), **options)


def inner(w):
    """How often the UNet itself is called, in a list that fills."""
    count = []
    return count, w.model.model.diffusion_model.register_forward_hook(lambda *_: count.append(1))


# Whose a place is


def test_of_one_alone_or_of_one_that_belongs_everywhere_nothing_is_kept_apart():
    assert members({"a": APART, "b": Acting()}, AB) == members({"a": APART, "b": APART}, A) == NONE
    assert members({"a": APART, "b": APART, "c": Acting()}, frozenset("abc")) == AB


def two_subjects(r=None):
    """What two words are read in a layer (1, 2, 16, 16): the first one left alone, the second one in both halves."""
    read = torch.full((1, 2, 16, 16), 0.1)
    read[0, 0, 4:12, 2:7] = 4
    read[0, 1, 4:12, 2:7], read[0, 1, 4:12, 10:15] = 2, 2.5
    read = read if r is None else read * torch.rand(read.shape, generator=r).add(0.75)
    return read / read.mean((2, 3), keepdim=True)


def test_a_place_belongs_to_the_word_that_is_read_there_more_than_in_the_other_subject():
    w = weights([two_subjects()])
    torch.testing.assert_close(w.sum(1), torch.ones(1, 16, 16))
    assert w[0, 0, 5:11, 3:6].min() > 0.95  # though the second is read there too
    assert w[0, 1, 5:11, 11:14].min() > 0.95


def test_a_layer_that_tells_nothing_apart_takes_nothing_from_one_that_does():
    r = torch.Generator().manual_seed(0)
    flat = two_subjects()[:, 1:].expand(-1, 2, -1, -1)
    w = weights([two_subjects(r), flat, two_subjects(r)])
    assert w[0, 0, 5:11, 3:6].min() > 0.8 and w[0, 1, 5:11, 11:14].min() > 0.8


def test_a_row_that_says_one_gives_it_every_place_and_one_that_says_none_is_edited_by_none():
    read = two_subjects().repeat(3, 1, 1, 1)
    read[1, 1], read[2] = 0, 0
    w = weights([read])
    assert torch.equal(w[1, 0], torch.ones(16, 16)) and not w[1, 1].any() and not w[2].any()
    found = split({AB: torch.ones(1, 1, 1)}, {"a": APART, "b": APART}, ("a", "b"), w)
    assert set(found) == {A, B} and torch.equal(found[A][1], torch.ones(16, 16)) and not found[B][1].any()
    torch.testing.assert_close(found[A] + found[B], torch.ones(3, 16, 16))
    torch.testing.assert_close(weights([two_subjects()])[0], w[0])  # whatever else is in the batch


def test_a_style_acts_everywhere_and_a_region_is_parted_only_where_two_have_a_share():
    acting = {"a": APART, "b": APART, "s": Acting()}
    r, left = torch.ones(1, 2, 4, 4) / 2, torch.zeros(1, 8, 8)
    left[..., :4] = 1
    found = split({frozenset("abs"): left, frozenset("as"): 1 - left}, acting, ("a", "b", "s"), r)
    torch.testing.assert_close(found, {frozenset("as"): left / 2 + 1 - left, frozenset("bs"): left / 2})


def test_shares_are_on_the_device_of_what_was_read_parted_or_not():
    acting, share = {"a": APART, "b": APART, "s": Acting()}, torch.ones(1, 8, 8) / 2  # regions are on the CPU
    found = split({frozenset("abs"): share, frozenset("s"): share, frozenset("as"): share}, acting, ("a", "b"),
                  torch.ones(2, 2, 4, 4, device="meta"))
    assert len(found) == 3 and {part.device.type for part in found.values()} == {"meta"}


def test_the_versions_hold_each_alone_and_none_of_them():
    a, b = frozenset("a"), frozenset("b")
    assert versions({"a": APART, "b": APART}) == (NONE, a, a | b, b)
    assert versions({"a": APART, "b": Acting()}) == versions({"a": APART}) == (NONE,)


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_the_host_is_told_where_the_words_stand(world, kind):
    w = world(kind)
    _, clip = apply(w, *kept(w.cat, w.dog))
    tokens = next(iter(clip.tokenize(BOTH).values()))[0]
    at = [k for k, (t, _) in enumerate(tokens) if torch.is_tensor(t)]
    places = encode(clip, BOTH)[0][1]["model_conds"][PLACES].cond
    assert places.shape == (1, 77, 2) and places.nonzero()[:, 1:].tolist() == [[at[0], 0], [at[1], 1]]
    _, clip = apply(w, w.cat.kept_apart(True), w.dog)
    assert PLACES not in encode(clip, BOTH)[0][1]["model_conds"]


# Pictures


@pytest.mark.parametrize("kind", KINDS)
def test_two_that_are_named_are_drawn_otherwise_and_in_any_order(world, kind):
    w = world(kind)
    made = pictures(w, *kept(w.cat, w.dog))
    assert near(made, pictures(w, *kept(w.dog, w.cat)))
    assert not near(made, pictures(w, w.cat, w.dog), 1e-4)
    assert near(pictures(w, *kept(w.cat, w.dog), batch=2)[:1], made)
    assert swapped(w.model) == []


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_a_prompt_that_names_one_is_drawn_as_without_the_others(world, kind):
    w = world(kind)
    for prompt in "a <mimi>, red", "a cat":
        assert near(pictures(w, *kept(w.cat, w.dog, w.toy), prompt=prompt), pictures(w, w.cat, prompt=prompt))


def test_one_that_belongs_everywhere_is_not_parted_from(world):
    w = world()
    assert torch.equal(pictures(w, w.cat.kept_apart(True), w.dog), pictures(w, w.cat, w.dog))


def test_of_those_that_are_off_nothing_is_left(world):
    w = world()
    assert near(pictures(w, *kept(w.cat, w.dog.at(0))), pictures(w, w.cat, prompt="a <mimi> beside a dog"))


@pytest.mark.parametrize("steps", (2, 4))
def test_it_costs_one_call_of_the_model_a_run(world, steps):
    w = world()
    model, clip = apply(w, *kept(w.cat, w.dog))
    both, one, negative = (encode(clip, prompt) for prompt in (BOTH, "a <mimi>", ""))
    count, hook = inner(w)
    try:
        for prompt, more in ((both, 1), (one, 0), (both, 1)):  # a second run asks again
            count.clear()
            sample(model, prompt, negative, steps)
            assert len(count) == steps + more
    finally:
        hook.remove()


def test_only_the_words_of_a_prompt_cost_attention(world):
    w, rows = world(), []
    model, clip = apply(w, *kept(w.cat, w.dog, w.toy))
    layer = next(m for name, m in w.model.model.named_modules() if name.endswith("attn2.to_out"))
    hook = layer.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    to_q = next(m for name, m in w.model.model.named_modules() if name.endswith("attn2"))
    hooks = [hook, to_q.to_k.register_forward_hook(lambda m, args, out: rows.append(len(out)))]
    try:
        sample(model, encode(clip, BOTH), encode(clip, ""), steps=1)
    finally:
        for hook in hooks:
            hook.remove()
    assert max(rows) == 4  # two sets for each of two prompts


def test_a_call_for_a_part_of_the_picture_is_read_anew(world):
    """As the host's context windows make them, one after the other under one prompt."""
    w = world()
    model, clip = apply(w, *kept(w.cat, w.dog))
    count, hook = inner(w)

    def halves(apply_model, given):
        x = given["input"]
        return torch.cat([apply_model(part, given["timestep"], **given["c"]) for part in x.chunk(2, -1)], -1)

    model.set_model_unet_function_wrapper(halves)
    try:
        sample(model, encode(clip, BOTH), encode(clip, ""), steps=2)
    finally:
        hook.remove()
    assert len(count) == 2 * 2 * 2  # steps, halves, and the two calls of each


def test_where_every_row_is_edited_nothing_is_kept_apart(world):
    w = world()
    model, clip = apply(w, *kept(w.cat, w.dog), edit_negative=True)
    joint, _ = apply(w, w.cat, w.dog, edit_negative=True)
    words = encode(clip, BOTH), encode(clip, "blurry")
    assert near(sample(model, *words), sample(joint, *words))


def test_what_is_read_is_of_the_superclass_words_and_of_a_run_of_its_own(world):
    """Whatever the concepts are, whose a place is depends on their words' places alone: strength changes no share."""
    w = world()
    first = pictures(w, *kept(w.cat, w.dog))
    model, clip = apply(w, *kept(w.cat, w.dog))
    words = encode(clip, BOTH), encode(clip, "blurry")
    sample(model, *words, steps=3)
    assert torch.equal(sample(model, *words), first)


def test_the_wrapper_of_a_run_is_there_once_and_only_where_two_are_kept_apart(world):
    w = world()
    for concepts, many in ((kept(w.cat), 0), (kept(w.cat, w.dog), 1), (kept(w.cat, w.dog, w.toy), 1),
                           ([w.cat, w.dog], 0)):
        model, _ = apply(w, *concepts)
        assert len(model.get_all_wrappers(WrappersMP.OUTER_SAMPLE)) == many


def test_a_prompt_that_another_node_has_lengthened_is_drawn_jointly(world):
    w, made = world(), []
    for concepts in kept(w.cat, w.dog), (w.cat, w.dog):
        model, clip = apply(w, *concepts)
        joined, = nodes.ConditioningConcat().concat(encode(clip, BOTH), encode(clip, "snow"))
        made.append(sample(model, joined, encode(clip, "")))
    assert near(*made)


def test_a_long_prompt_is_parted_by_words_in_every_chunk(world):
    w = world()
    long = f"a <mimi> {' '.join(['tree'] * 90)} a <rex>"
    assert not near(pictures(w, *kept(w.cat, w.dog), prompt=long), pictures(w, w.cat, w.dog, prompt=long), 1e-4)


def test_a_control_that_the_model_takes_out_is_there_for_the_drawing_call_as_well(world):
    """A ControlNet's maps are lists that a call of the UNet empties."""
    w = world()

    class Constant(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            r = torch.Generator().manual_seed(1)
            return {"output": [], "input": [], "middle": [torch.randn(1, 1, 1, 1, generator=r).expand(
                1, w.model.model.diffusion_model.middle_block[0].channels, 1, 1)]}

        def copy(self):
            return self

    model, clip = apply(w, *kept(w.cat, w.dog))
    words = encode(clip, BOTH), encode(clip, "")
    control, found, unet = Constant(), [], w.model.model.diffusion_model
    controlled = [[(c, {**more, "control": control, "control_apply_to_uncond": True}) for c, more in of]
                  for of in words]
    hook = unet.register_forward_pre_hook(lambda m, args, more: found.append(len(more["control"]["middle"])),
                                          with_kwargs=True)
    try:
        sample(model, *controlled, steps=1)
    finally:
        hook.remove()
    assert found == [1, 1]


def test_a_clip_that_keeps_nothing_apart_is_drawn_jointly(world):
    """Where MODEL and CLIP come from two chains of Apply."""
    w = world()
    parted, _ = apply(w, *kept(w.cat, w.dog))
    joint, clip = apply(w, w.cat, w.dog)
    words = encode(clip, BOTH), encode(clip, "")
    assert torch.equal(sample(parted, *words), sample(joint, *words))
