"""Concepts on a ComfyUI model: against the textbook formula, and beside all else that a graph does to a model."""

from contextlib import contextmanager
from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch._dynamo.utils import counters

from perfusion.core import apply as applying
from perfusion.core.concept import Concept
from perfusion.core.covariance import PACKAGED
from perfusion.core.host_comfy import encode_chunks
from perfusion.core.key_lock import direction, invert, second_moment
from perfusion.core.prompt import PRESENT, WORDS, Token, encoder, superclass_ids, with_word, words_of

pytestmark = pytest.mark.host
KINDS = ("sd1", "sd2", "sd2-v", "sdxl", "sd1-inpaint")
PLACES = {"sd1": 14, "sd2": 30, "sd2-v": 30, "sdxl": 22, "sd1-inpaint": 14}  # keys and values
TINY = 1e-4  # of the edit's effect
BATCHED = 1e-5  # of the picture: what one batch of two and two of one may differ by


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def world(tiny):
    """A kind's model, clip and C⁻¹, and three concepts of it. Nothing may change the model, so all tests share it."""
    made = {}

    def get(kind="sd1"):
        if kind not in made:
            made[kind] = world_of(*tiny(kind)[:2])
        return made[kind]

    return get


def world_of(model, clip):
    captions = PACKAGED.read_text(encoding="utf-8").splitlines()[::32]
    encodings, _ = encode_chunks(clip.encode_from_tokens, [clip.tokenize(line) for line in captions])
    w = SimpleNamespace(model=model, clip=clip, inverse=invert(second_moment(encodings)[0], ridge=0.01))
    w.cat, w.dog, w.toy = (
        random_concept(w, word, superclass, seed)
        for seed, (word, superclass) in enumerate((("<mimi>", "cat"), ("<rex>", "dog"), ("<bot>", "toy")))
    )
    return w


def random_concept(w, word, superclass, seed) -> Concept:
    """A concept whose vector is near the superclass word's, and whose values are W i* plus as much noise."""
    generator, ids, embedding = torch.Generator().manual_seed(seed), superclass_ids(w.clip, superclass), {}
    for name, i in ids.items():
        v = encoder(w.clip, name).transformer.get_input_embeddings().weight[i].float()
        embedding[name] = v + v.std() * torch.randn(v.shape, generator=generator)
    taught = with_word(w.clip, word, Token(embedding, ids))
    tokens = taught.tokenize(f"a photo of a {word}")
    at = [torch.is_tensor(t) for t, _ in next(iter(tokens.values()))[0]].index(True)
    target_input = taught.encode_from_tokens(tokens)[0, at]
    along, energy = direction(w.inverse, target_input)
    target_output = {}
    for name, module in projections(w.model).items():
        if name.endswith("to_v"):
            o = module.weight.float() @ target_input
            target_output[name] = o + o.std() * torch.randn(o.shape, generator=generator)
    return Concept(
        base=applying.base_of(w.model), superclass=superclass, word=word, embedding=embedding,
        target_input=target_input, key_input=w.clip.encode(f"a photo of a {superclass}")[0, at],
        direction=along.float(), target_output=target_output, energy=energy, covariance="c" * 32,
        strength=0.5 + seed / 10,
    )


def projections(model):
    return applying.projections(model.model.diffusion_model)


def apply(w, *concepts, model=None, clip=None, **options):
    model, clip = model or w.model, clip or w.clip
    for concept in concepts:
        model, clip = applying.apply(model, clip, concept, **options)
    return model, clip


def encode(clip, prompt):
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def sample(model, positive, negative, steps=2, batch=1):
    latent = torch.zeros(batch, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 7)
    return comfy.sample.sample(model, noise, steps, 5.0, "euler", "normal", positive, negative, latent, seed=7,
                               disable_pbar=True)


@contextmanager
def textbook(w, concepts, named, model=None):
    """The projections of a plain model answer by the formula, in fp64 and from W itself, while the block is open.

    `named` is a list of (conditioning, weight per concept): which rows name which concepts. Nothing of the edit under
    test is used, neither its marks nor its directions: C⁻¹ is the one that the concepts were made under.
    """
    I = torch.stack([c.target_input for c in concepts]).double()  # noqa: E741
    G = I @ w.inverse @ I.T
    bias = torch.tensor([0.60 - 0.30 * c.strength for c in concepts], dtype=torch.float64)
    rows = [(cond[0][0][0], weights) for cond, weights in named]

    def answer(name, module, x, plain):
        W, out = module.weight.double(), plain.clone()
        for b, row in enumerate(x):
            weights = next((weights for cond, weights in rows if torch.equal(cond, row)), (0,) * len(concepts))
            on = [j for j, weight in enumerate(weights) if weight]
            if not on:
                continue
            p = row.double() @ w.inverse @ I[on].T
            s = p / G.diagonal()[on]
            g = torch.sigmoid((s - bias[on]) / 0.10) * torch.tensor([weights[j] for j in on], dtype=torch.float64)
            c = torch.linalg.solve(G[on][:, on], p.T).T
            o = torch.stack([concepts[j].target_output[name].double() if name.endswith("to_v")
                             else W @ concepts[j].key_input.double() for j in on])
            out[b] = (row.double() - c @ I[on]) @ W.T + g @ o
        return out

    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: answer(name, module, args[0], out))
        for name, module in projections(model or w.model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def off_by(picture, expected, of):
    """How far a picture is from the expected one, in units of what `of` (a picture) differs from it by."""
    return ((picture - expected).abs().max() / (of - expected).abs().max()).item()


def near(picture, expected, tolerance=BATCHED):
    return ((picture - expected).abs().max() / expected.abs().max()).item() < tolerance


def swapped(model):
    return [name for name, module in model.model.named_modules() if "forward" in vars(module)]


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


# Beside what else a graph does to a model


def lora_of(w):
    """A LoRA of every attention projection, and a plain difference on one more weight."""
    generator = torch.Generator().manual_seed(11)
    lora = {}
    for name, module in w.model.model.named_modules():
        if name.endswith((".to_k", ".to_v", ".to_q")):
            rows, columns = module.weight.shape
            lora[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) * 0.1
            lora[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) * 0.2
    lora["diffusion_model.out.2.diff_b"] = torch.ones(4) * 0.01
    return lora


def with_lora(w, model):
    return comfy.sd.load_lora_for_models(model, None, lora_of(w), 0.8, 0.0)[0]


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_a_lora_before_or_after_gives_the_edit_of_the_patched_weights(world, kind):
    w = world(kind)
    model, clip = apply(w, w.cat)
    words, plain = (encode(clip, "a <mimi>"), encode(clip, "")), (encode(w.clip, "a cat"), encode(w.clip, ""))
    base = sample(w.model, *plain)
    edited = sample(model, *words)
    patched = with_lora(w, w.model)
    before, after = apply(w, w.cat, model=patched)[0], with_lora(w, model)
    pictures = [sample(m, *words) for m in (before, after, before)]
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])
    with textbook(w, [w.cat], [(words[0], (1.0,))]):
        expected = sample(patched, *words)
    assert off_by(pictures[0], expected, of=sample(patched, *words)) < TINY
    assert not near(pictures[0], edited, 0.01)
    assert torch.equal(sample(w.model, *plain), base)


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_a_replaced_attention_gets_edited_keys_and_values(world, kind):
    w = world(kind)
    blocks = sorted({tuple(name.split(".")[:6]) for name in projections(w.model)})

    def replaced(model, got):
        model = model.clone()
        for section, *rest in blocks:
            number, index = (int(rest[0]), int(rest[3])) if section != "middle_block" else (0, int(rest[2]))

            def patch(q, k, v, options):
                got.append((k, v))
                return optimized_attention(q, k, v, options["n_heads"]) + 0.1 * v.mean(1, keepdim=True)

            model.set_model_attn2_replace(patch, section.split("_")[0], number, index)
        return model

    model, clip = apply(w, w.cat)
    words = encode(clip, "a <mimi>"), encode(clip, "")
    edited, expected, base = [], [], []
    picture = sample(replaced(model, edited), *words, steps=1)
    plain = sample(replaced(w.model, base), *words, steps=1)
    with textbook(w, [w.cat], [(words[0], (1.0,))]):
        by_formula = sample(replaced(w.model, expected), *words, steps=1)
    assert len(edited) == len(expected) == PLACES[kind] // 2
    for got, right, raw in zip(edited, expected, base, strict=True):
        assert all(off_by(a, b, of=c) < TINY for a, b, c in zip(got, right, raw, strict=True))
    assert off_by(picture, by_formula, of=plain) < TINY
    before, _ = apply(w, w.cat, model=replaced(w.model, []))
    assert torch.equal(sample(before, *words, steps=1), picture)


def test_a_layer_that_is_given_another_text_is_edited_on_that(world):
    w = world()
    model, clip = apply(w, w.cat)
    positive, other, negative = (encode(clip, prompt) for prompt in ("a <mimi>", "a blue (<mimi>:1.1)", ""))

    def regional(model):
        def patch(n, k, v, options):
            if options["block"][0] != "middle":
                v = torch.stack([other[0][0][0] if torch.equal(row, positive[0][0][0]) else row for row in v])
            return n, k, v

        model = model.clone()
        model.set_model_attn2_patch(patch)
        return model

    picture = sample(regional(model), positive, negative)
    with textbook(w, [w.cat], [(positive, (1.0,)), (other, (1.0,))]):  # the weight is that of the row's own prompt
        expected = sample(regional(w.model), positive, negative)
    assert off_by(picture, expected, of=sample(regional(w.model), positive, negative)) < TINY
    assert not near(picture, sample(model, positive, negative), 1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_another_packs_wrapper_sees_no_difference(world, first):
    w = world()

    def observed(model):
        calls = []

        def wrapper(executor, *args, **kwargs):
            x, t, c_concat, c_crossattn, control, options = args
            calls.append((x.clone(), t.clone(), c_concat, c_crossattn.clone(), control, sorted(options),
                          sorted(set(kwargs) - {PRESENT, WORDS})))
            return executor(*args, **kwargs) * 0.9

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", wrapper)
        return model, calls

    if first:
        other, calls = observed(w.model)
        model, clip = apply(w, w.cat, model=other)
    else:
        model, clip = apply(w, w.cat)
        model, calls = observed(model)
    base, base_calls = observed(w.model)
    words = encode(clip, "a <mimi>"), encode(clip, "")
    picture, plain = sample(model, *words), sample(base, *words)
    with textbook(w, [w.cat], [(words[0], (1.0,))]):
        assert off_by(picture, sample(base, *words), of=plain) < TINY
    for mine, theirs in zip(calls[:1], base_calls[:1], strict=True):
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(mine, theirs, strict=True))
    assert len(calls) == 2 and torch.equal(calls[1][3], base_calls[1][3])
    no_words = encode(clip, "a cat"), encode(clip, "")
    assert torch.equal(sample(model, *no_words), sample(base, *no_words))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_weights_stored_in_few_bits_are_edited(tiny, tmp_path, dtype):
    import checkpoints

    path = checkpoints.save_tiny("sd1", tmp_path / "sd1.safetensors")
    model, clip = comfy.sd.load_checkpoint_guess_config(str(path), model_options={"dtype": dtype})[:2]
    w = world_of(model, clip)
    assert all(module.weight.dtype == dtype for module in projections(model).values())
    plain = encode(clip, "a cat"), encode(clip, "")
    base = sample(model, *plain)
    edited, taught = apply(w, w.cat)
    words = encode(taught, "a <mimi>"), encode(taught, "")
    picture = sample(edited, *words)
    assert picture.isfinite().all() and not near(picture, sample(model, *words), 0.01)
    if dtype == torch.float8_e4m3fn:  # the host computes in fp32 then
        with textbook(w, [w.cat], [(words[0], (1.0,))]):
            assert off_by(picture, sample(model, *words), of=base) < TINY
    assert torch.equal(sample(model, *plain), base) and torch.equal(sample(edited, *words), picture)


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_weights_that_do_not_fit_into_memory_are_edited_all_the_same(world, kind):
    w = world(kind)
    model, clip = apply(w, w.cat, model=with_lora(w, w.model))
    words = encode(clip, "a <mimi>"), encode(clip, "")
    whole = sample(model, *words)
    offloaded = model.clone()
    patches = []

    def offload(executor, *args, **kwargs):  # the host has loaded the model by now
        offloaded.unpatch_model(offloaded.offload_device)
        offloaded.load(offloaded.load_device, lowvram_model_memory=1)
        patches.append(offloaded.lowvram_patch_counter())
        return executor(*args, **kwargs)

    offloaded.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "offload", offload)
    picture = sample(offloaded, *words)
    assert patches[0] > PLACES[kind]
    assert near(picture, whole)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model, *words), whole) and swapped(w.model) == []


BLOCK = "diffusion_model.middle_block.1.transformer_blocks.0"


@pytest.mark.parametrize("keys", [["diffusion_model"], [BLOCK]], ids=["whole", "in part"])
def test_a_compiled_model_is_edited_without_a_graph_more(world, keys):
    w = world()
    torch._dynamo.reset()
    counters.clear()
    eager, clip = apply(w, w.cat)
    words = encode(clip, "a <mimi>"), encode(clip, "")
    base, compiled = sample(w.model, *words), w.model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=keys)

    def outside(concept):
        return apply(w, concept, model=compiled)[0]

    def inside(concept):
        model = apply(w, concept)[0]
        wrapper, = compiled.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile")
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", wrapper)
        return model

    def graphs():
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]

    assert near(sample(compiled, *words), base)
    plain = graphs()
    assert plain == len(keys)
    for edited in (outside, inside):
        assert near(sample(edited(w.cat), *words), sample(eager, *words))
        for strength in (0.2, 1.0):
            stronger = w.cat.replace(strength=strength)
            assert near(sample(edited(stronger), *words), sample(apply(w, stronger)[0], *words))
    assert near(sample(compiled, *words), base)
    assert graphs() == 2 * plain and swapped(w.model) == []


def test_the_edit_runs_where_the_model_runs(tiny):
    w = world_of(*tiny("sd1")[:2])
    (model, _), (_, clip) = apply(w, w.cat, w.dog), apply(w, w.cat)  # this CLIP does not know all the model's words
    marks = {name: cond.cond for name, cond in encode(clip, "a <mimi>")[0][1]["model_conds"].items()}
    name = next(name for name in projections(model) if name.endswith("to_v"))
    model.model.to("meta")  # the one device besides the CPU that every machine has

    def call(x, t, c_concat, c_crossattn, control, transformer_options):
        return projections(model)[name](c_crossattn)

    x, context = torch.zeros(1, 4, 8, 8, device="meta"), torch.zeros(1, 77, 64, device="meta")
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, applying.KEY)
    run = WrapperExecutor.new_class_executor(call, model.model, wrappers)
    assert run.execute(x, None, None, context, None, {}, **marks).device == x.device


# What does not fit


def refused(w, concept, said, model=None, clip=None):
    """The concept is refused in these words, and nothing is left of the attempt."""
    model, clip = model or w.model, clip or w.clip
    wrappers, words = model.get_all_wrappers(WrappersMP.APPLY_MODEL), list(words_of(clip))
    with pytest.raises(ValueError, match=said):
        applying.apply(model, clip, concept)
    assert model.get_all_wrappers(WrappersMP.APPLY_MODEL) == wrappers
    assert list(words_of(clip)) == words and swapped(model) == []


def test_a_concept_of_another_base_gets_a_sentence(world):
    refused(world("sd1"), world("sdxl").cat, "<mimi> was made for SDXL, the connected model is SD1.5. Load a check")
    refused(world("sdxl"), world("sd1").cat, "made for SD1.5, the connected model is SDXL")
    refused(world("sd2"), world("sd1").cat, "made for SD1.5, the connected model is SD2.x")


def test_the_clip_of_another_family_gets_a_sentence(world):
    w = world("sd1")
    refused(w, w.cat, "model is SD1.5 .* should be clip_l; the connected CLIP is clip_h", clip=world("sd2").clip)
    refused(w, w.cat, "connected CLIP is clip_g . clip_l", clip=world("sdxl").clip)
    refused(world("sdxl"), world("sdxl").cat, "should be clip_g . clip_l; the connected CLIP is clip_l", clip=w.clip)


def test_a_concept_of_a_unet_with_other_layers_gets_a_sentence(world):
    w = world()
    name, o = next(iter(w.cat.target_output.items()))
    rest = {n: v for n, v in w.cat.target_output.items() if n != name}
    refused(w, w.cat.replace(target_output=rest), "holds 6 value outputs .* has 7 value projections.*tune it again")
    refused(w, w.cat.replace(target_output={**rest, name: o[:-1]}), "7 value projections of other names or widths")
    refused(w, w.cat.replace(target_output={**rest, "input_blocks.9.1.to_v": o}), "of other names or widths")
    refused(w, w.cat.replace(embedding={}), "embeddings for no encoder")


def test_concepts_of_different_covariances_get_a_sentence(world):
    w = world()
    model, clip = apply(w, w.cat)
    refused(w, w.dog.replace(covariance="d" * 32), "<mimi> and <rex> .*cccccccccccc and dddddddddddd", model, clip)


def test_the_same_concept_twice_gets_a_sentence(world):
    w = world()
    model, clip = apply(w, w.cat)
    refused(w, w.cat, "Two of the applied concepts are called <mimi>", model, clip)
    refused(w, w.cat.replace(word="<other>"), "the same to the text encoder", model, clip)


def test_a_superclass_of_several_words_gets_a_sentence(world):
    refused(world(), world().cat.replace(superclass="black cat"), "one plain word")


def test_an_unsupported_architecture_gets_a_sentence(world):
    w = world("sdxl")
    config = comfy.supported_models.SDXLRefiner(dict(w.model.model.model_config.unet_config))
    config.unet_config.pop("num_heads", None)
    model = config.get_model({}, "", device="cpu")
    cpu = torch.device("cpu")
    refused(w, w.cat, "SD1.5, SD2.x and SDXL; the connected model is SDXLRefiner", ModelPatcher(model, cpu, cpu))
