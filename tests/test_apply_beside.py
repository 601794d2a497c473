"""Concepts on a ComfyUI model, beside all else that a graph does to a model."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch._dynamo.utils import counters

from perfusion.core import apply as applying
from perfusion.core.prompt import PRESENT, WORDS

import applied
from applied import PLACES, TINY, apply, encode, near, off_by, projections, sample, swapped, textbook, world_of

pytestmark = pytest.mark.host

inference, world = applied.inference, applied.world  # fixtures


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


@pytest.mark.full
def test_two_concepts_kept_apart_are_drawn_by_what_inductor_compiles(world):
    """It writes and builds C++ on a CPU, a minute and more."""
    w = world()
    torch._dynamo.reset()
    pair = w.cat.kept_apart(True), w.dog.kept_apart(True)
    eager, clip = apply(w, *pair)
    words, compiled = (encode(clip, "a <mimi> and a <rex>"), encode(clip, "")), w.model.clone()
    set_torch_compile_wrapper(compiled, backend="inductor", keys=["diffusion_model"])
    picture, plain = sample(apply(w, *pair, model=compiled)[0], *words), sample(w.model, *words)
    assert off_by(picture, sample(eager, *words), of=plain) < 1e-3


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
