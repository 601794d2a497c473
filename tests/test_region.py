"""Where concepts act: shares of pixels, the blend in real attention layers of the host, and whole pictures."""

import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch._dynamo.utils import counters

from perfusion.core.acting import Acting
from perfusion.core.prompt import PRESENT, WORDS
from perfusion.core.region import Blend, grid, shares

import applied
from applied import KINDS, apply, encode, near, projections, sample, swapped

pytestmark = pytest.mark.host

inference, world = applied.inference, applied.world  # fixtures
ONES, ZEROS = torch.ones(1, 16, 16), torch.zeros(1, 16, 16)
LEFT = torch.cat([torch.ones(1, 16, 8), torch.zeros(1, 16, 8)], -1)
SOFT = torch.linspace(0, 1, 16).expand(1, 16, 16)
A, B, NONE = frozenset("a"), frozenset("b"), frozenset()


def within(concept, region, **more):
    return concept.replace(acting=Acting(region=region, **more))


# Shares


def test_the_shares_of_a_pixel_sum_to_1_and_do_not_depend_on_an_order():
    r = torch.Generator().manual_seed(0)
    regions = {word: torch.rand(1, 12, 12, generator=r) for word in "abc"}
    found = shares(regions)
    assert len(found) == 8
    torch.testing.assert_close(sum(found.values()), torch.ones(1, 12, 12))
    again = shares(dict(reversed(regions.items())))
    assert all(torch.equal(again[words], share) for words, share in found.items())
    inside = regions["a"] * regions["b"] * (1 - regions["c"])
    torch.testing.assert_close(found[frozenset("c")], inside)


def test_sets_without_a_pixel_are_left_out():
    assert set(shares({})) == set(shares({"a": ONES})) == {NONE}
    assert set(shares({"a": ZEROS})) == {A}
    assert set(shares({"a": LEFT})) == {NONE, A}
    assert set(shares({"a": LEFT, "b": 1 - LEFT})) == {A, B}
    assert set(shares({"a": LEFT, "b": torch.zeros(1, 3, 5)})) == {B, A | B}


@pytest.mark.parametrize("size", [(8, 8), (96, 64), (9, 15), (64, 136), (17, 33)])
def test_the_queries_of_every_level_lie_as_the_latents_do(size):
    h, w = size
    while min(h, w) > 1:
        assert grid(h * w, size) == (h, w)
        h, w = -(-h // 2), -(-w // 2)  # as a convolution with stride 2 leaves them


# The blend in a layer


def answers(model, *words):
    """What the first cross-attention layer of a model is asked and answers, (b, h, w, d) each, in one step."""
    found = []
    layer = next(m for name, m in model.model.named_modules() if name.endswith("attn2"))
    hooks = [layer.to_q.register_forward_hook(lambda m, args, out: found.append(args[0])),
             layer.to_out.register_forward_hook(lambda m, args, out: found.append(out))]
    try:
        sample(model, *words, steps=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [x.unflatten(1, grid(x.shape[1], (8, 8))) for x in found[:2]]


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_in_a_layer_each_half_answers_as_its_own_set_does_everywhere(world, kind):
    w, found = world(kind), []
    for region in LEFT, ONES, ZEROS:
        model, clip = apply(w, within(w.cat, region))
        found.append(answers(model, encode(clip, "a <mimi>, red"), encode(clip, "")))
    (asked, half), (asked_on, on), (asked_off, off) = found
    assert torch.equal(asked, asked_on) and torch.equal(asked, asked_off)
    middle = half.shape[2] // 2
    assert near(half[:, :, :middle], on[:, :, :middle], 1e-6) and near(half[:, :, middle:], off[:, :, middle:], 1e-6)
    assert not near(on, off, 1e-3)


def test_where_all_sets_answer_the_same_the_blend_is_that_to_the_bit():
    r = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 16, 5, generator=r)
    assert torch.equal(Blend([SOFT, 1 - SOFT], (8, 8))(x.expand(-1, 2, -1, -1)), x[:, 0])


# Pictures


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_of_ones_is_none_and_a_region_of_zeros_is_strength_0_bit_for_bit(world, kind):
    w = world(kind)
    pictures = []
    for concept in w.cat, within(w.cat, ONES), within(w.cat, ZEROS), w.cat.at(0):
        model, clip = apply(w, concept)
        positive, negative = encode(clip, "a (<mimi>:1.2), red"), encode(clip, "blurry")
        pictures.append(sample(model, positive, negative))
    assert torch.equal(*pictures[:2]) and torch.equal(*pictures[2:]) and not near(*pictures[1:3], 1e-3)
    model, clip = apply(w, within(w.cat, ONES))
    assert set(encode(clip, "a <mimi>")[0][1]["model_conds"]) == {WORDS, PRESENT}


@pytest.mark.parametrize("kind", KINDS)
def test_an_even_region_of_nearly_1_is_nearly_none(world, kind):
    """Both sets are computed and blended here."""
    w = world(kind)
    pictures = []
    for concept in w.cat, within(w.cat, ONES * (1 - 1e-6)):
        model, clip = apply(w, concept)
        pictures.append(sample(model, encode(clip, "a <mimi>, red"), encode(clip, "blurry")))
    assert near(*pictures)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_the_word_are_untouched_in_every_region(world, kind):
    w = world(kind)
    model, clip = apply(w, within(w.cat, SOFT), within(w.dog, LEFT))
    marked, plain = ([encode(c, prompt) for prompt in ("a photo of a cat", "blurry")] for c in (clip, w.clip))
    assert near(sample(model, *marked), sample(w.model, *plain), 1e-6)
    assert swapped(w.model) == []


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_two_concepts_have_two_regions_in_any_order(world, kind):
    w = world(kind)
    words, pictures = "<mimi> and a <rex>", []
    for order in (within(w.cat, LEFT), within(w.dog, SOFT)), (within(w.dog, SOFT), within(w.cat, LEFT)):
        model, clip = apply(w, *order)
        pictures.append(sample(model, encode(clip, words), encode(clip, "")))
    assert near(*pictures)
    model, clip = apply(w, within(w.cat, ONES), within(w.dog, ZEROS))
    alone, own = apply(w, w.cat)
    picture = sample(model, encode(clip, words), encode(clip, ""))
    assert near(picture, sample(alone, encode(own, "<mimi> and a dog"), encode(own, "")))
    model, clip = apply(w, w.cat, w.dog)
    assert not near(pictures[0], sample(model, encode(clip, words), encode(clip, "")), 1e-3)


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_a_region_holds_for_the_part_of_sampling_in_which_its_concept_acts(world, kind):
    w = world(kind)
    never, clip = apply(w, within(w.cat, LEFT, start=0.6, end=0.4))
    picture = sample(never, encode(clip, "a <mimi>"), encode(clip, ""))
    assert torch.equal(picture, sample(w.model, encode(w.clip, "a cat"), encode(w.clip, "")))


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
@pytest.mark.parametrize("first", [True, False])
def test_a_replaced_attention_that_tells_positive_from_negative_works_inside_a_region(world, kind, first):
    """As adapters of pictures do: a term for the rows of each kind, which `cond_or_uncond` gives in their order. What
    it adds is the same for all sets, and is blended with itself."""
    w = world(kind)
    blocks = sorted({tuple(name.split(".")[:6]) for name in projections(w.model)})

    def replaced(model):
        model = model.clone()
        for section, *rest in blocks:
            number, index = (int(rest[0]), int(rest[3])) if section != "middle_block" else (0, int(rest[2]))

            def patch(q, k, v, options):
                kinds = options["cond_or_uncond"]
                term = torch.tensor(kinds, dtype=q.dtype).repeat_interleave(len(q) // len(kinds))
                return optimized_attention(q, k, v, options["n_heads"]) + 0.1 * term[:, None, None] * q.mean()

            model.set_model_attn2_replace(patch, section.split("_")[0], number, index)
        return model

    model, clip = apply(w, within(w.cat, LEFT), model=replaced(w.model) if first else w.model)
    words = encode(clip, "a <mimi>"), encode(clip, "")
    picture = sample(model if first else replaced(model), *words)
    ends = [sample(replaced(apply(w, within(w.cat, region))[0]), *words) for region in (ONES * (1 - 1e-6), LEFT)]
    whole, own = apply(w, w.cat)
    assert near(ends[0], sample(replaced(whole), encode(own, "a <mimi>"), encode(own, "")))
    assert torch.equal(ends[1], picture) and not near(ends[0], picture, 1e-4)


def test_a_region_is_that_of_every_picture_of_a_batch(world):
    w = world()
    model, clip = apply(w, within(w.cat, LEFT))
    words = encode(clip, "a <mimi>"), encode(clip, "")
    assert near(sample(model, *words, batch=2)[:1], sample(model, *words))


def test_a_compiled_model_is_edited_in_a_region_in_one_graph(world):
    w = world()
    torch._dynamo.reset()
    counters.clear()
    eager, clip = apply(w, within(w.cat, LEFT, lock="global"))
    words, compiled = (encode(clip, "a <mimi>"), encode(clip, "")), w.model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=["diffusion_model"])
    for _ in range(2):
        picture = sample(apply(w, within(w.cat, LEFT, lock="global"), model=compiled)[0], *words)
        assert near(picture, sample(eager, *words))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_several_masks_at_once_get_a_sentence():
    with pytest.raises(ValueError, match="one mask for all pictures, and 3 came"):
        Acting(region=torch.ones(3, 8, 8))
