"""Where a concept acted: against attention recomputed from what the layers met, and that nothing else changes."""

import math
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper

from perfusion.core import apply as applying
from perfusion.core.acting import Acting
from perfusion.core.gate_reading import word_rows
from perfusion.core.joint_edit import JointEdit
from perfusion.core.where import layer_size, reading
from perfusion.core.where_comfy import traced

import applied
from applied import KINDS, apply, encode, near, sample, swapped

pytestmark = pytest.mark.host
DEMO = Path(__file__).parent.parent / "demo"

inference, world = applied.inference, applied.world  # fixtures


def test_a_layer_has_the_size_of_the_latent_halved_and_rounded_up():
    assert [layer_size(n, 9, 16) for n in (144, 40, 12, 4, 1)] == [(9, 16), (5, 8), (3, 4), (2, 2), (1, 1)]
    assert layer_size(100, 9, 16) is None


def test_a_places_heat_is_what_it_reads_of_open_tokens():
    r = torch.Generator().manual_seed(0)
    q, k, g = (torch.randn(*shape, generator=r) for shape in ((6, 8), (5, 8), (5, 2)))
    expected = torch.zeros(6, 2)
    for head in range(2):
        of = slice(4 * head, 4 * head + 4)
        for place in range(6):
            reads = [math.exp((q[place, of] @ k[token, of]).item() / 2) for token in range(5)]
            expected[place] += sum(w / sum(reads) * g[token] for token, w in enumerate(reads)) / 2
    torch.testing.assert_close(reading(q, k, g, 2), expected)


def watched(model, concepts, weights, prompt, clip, steps=2, batch=1):
    """Latents of a run, and its heat recomputed from the queries and contexts that the layers met."""
    edit = JointEdit(concepts)(torch.tensor([weights]))
    words = word_rows(next(iter(clip.tokenize(prompt).values())), applied_tokenizer(clip))
    found = []

    def hook(attention, args, options):
        q = attention.to_q(args[0])
        keys, _, g = edit(options["context"])
        k = attention.to_k.weight @ keys.mT
        said = torch.tensor(options["transformer_options"]["cond_or_uncond"]).repeat_interleave(batch) == 0
        heads = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (q, k.mT))
        q, k = (t[said] for t in heads)
        a = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean(1)
        heat = a @ (g[said] * words.repeat(g.shape[1] // len(words))[:, None])
        h = layer_size(heat.shape[1], 8, 8)
        found.append(torch.nn.functional.interpolate(heat.mT.unflatten(-1, h), (8, 8), mode="bilinear"))

    modules = [m for name, m in model.model.diffusion_model.named_modules() if name.endswith("attn2")]
    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        latents = sample(model, encode(clip, prompt), encode(clip, "a tree"), steps=steps, batch=batch)
    finally:
        for h in hooks:
            h.remove()
    return latents, torch.stack(found).mean(0)


def applied_tokenizer(clip):
    from perfusion.core.prompt import tokenizers

    return next(iter(tokenizers(clip).values()))


@pytest.mark.parametrize("kind", KINDS)
def test_heat_is_the_attention_to_open_words_and_the_picture_is_bit_for_bit_the_same(world, kind):
    w = world(kind)
    model, clip = apply(w, w.cat, w.dog)
    prompt = "<rex> and (<mimi>:0.8), " + "red " * (80 if kind == "sd1" else 3)  # of two chunks, with one of one
    latents, expected = watched(model, (w.cat, w.dog), (0.8, 1.0), prompt, clip, batch=2)
    twin, trace = traced(model)
    again = sample(twin, encode(clip, prompt), encode(clip, "a tree"), batch=2)
    assert torch.equal(again, latents) and swapped(w.model) == []
    run = trace.of(latents)
    assert run.heat.shape == (2, 2, 8, 8) and 0 < run.heat.min() and run.heat.max() < 1
    torch.testing.assert_close(run.heat, expected, atol=1e-5, rtol=1e-3)
    assert [word for word, _ in run.words] == ["<mimi>", "<rex>"]
    for _, gates in run.words:
        assert {"<rex>", "<mimi>", "and", ",", "red", ""} == {said for said, _ in gates}
        assert gates == sorted(gates, key=lambda pair: -pair[1])
    g = JointEdit((w.cat, w.dog))(torch.tensor([[0.8, 1.0]]))(encode(clip, prompt)[0][0])[2][0, 1]  # its first word's
    assert [dict(gates)["<rex>"] for _, gates in run.words] == pytest.approx(g.tolist(), rel=1e-3)


def test_each_run_of_one_model_is_found_by_what_it_made(world):
    w = world()
    model, clip = apply(w, w.cat)
    model, trace = traced(model)
    made = [sample(model, encode(clip, prompt), encode(clip, "")) for prompt in ("a <mimi>", "a green <mimi>", "a cat")]
    heat = [trace.of(latents).heat for latents in made]
    assert not torch.equal(heat[0], heat[1])
    assert heat[2].shape == heat[0].shape and not heat[2].any()  # no prompt said the word
    assert torch.equal(trace.of(made[0].half()).heat, heat[0])  # as some hosts keep it
    with pytest.raises(ValueError, match="No run that was traced made these latents. Connect the model of Trace"):
        trace.of(made[0] + 0.1)
    with pytest.raises(ValueError, match="No run"):
        trace.of(torch.zeros(1, 4, 16, 16))


def test_the_first_picture_of_a_batch_has_the_heat_that_it_has_alone(world):
    w = world()
    model, clip = apply(w, w.cat)
    model, trace = traced(model)
    heat = [trace.of(sample(model, encode(clip, "a <mimi>"), encode(clip, ""), batch=m)).heat for m in (1, 3)]
    assert near(heat[1][:1], heat[0], 1e-4) and not near(heat[1][1:2], heat[0], 1e-3)


def test_a_concept_that_is_applied_behind_the_trace_is_traced_and_one_of_strength_0_has_no_map(world):
    w = world()
    model, trace = traced(w.model)
    off, clip = apply(w, w.cat.at(0), model=model)
    assert trace.of(sample(off, encode(clip, "a <mimi>"), encode(clip, ""))).heat.shape == (1, 0, 8, 8)
    on, clip = apply(w, w.cat, model=model)
    assert trace.of(sample(on, encode(clip, "a <mimi>"), encode(clip, ""))).heat.any()


def test_a_run_that_ends_early_leaves_nothing(world):
    w = world()
    model, clip = apply(w, w.cat)
    model, trace = traced(model)

    def stop(executor, *args, **kwargs):
        assert len(swapped(w.model)) > 0
        raise comfy.model_management.InterruptProcessingException

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stop", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, encode(clip, "a <mimi>"), encode(clip, ""))
    assert not trace.runs and swapped(w.model) == []


def test_a_compiled_model_is_traced(world):
    w = world()
    heat = []
    for model in (w.model, w.model.clone()):
        if heat:
            set_torch_compile_wrapper(model, backend="eager")
        model, clip = apply(w, w.cat, model=model)
        words = encode(clip, "a <mimi>"), encode(clip, "")
        twin, trace = traced(model)
        heat.append(trace.of(sample(twin, *words)).heat)
        assert near(trace.runs[0].latents, sample(model, *words))
    torch.testing.assert_close(heat[1], heat[0], atol=1e-5, rtol=1e-3)


def test_maps_are_drawn_over_pictures_of_any_size_or_over_nothing(world, pack):
    w = world()
    model, clip = apply(w, w.cat, w.dog)
    model, trace = pack["PerfusionTrace"].execute(model).result
    samples = {"samples": sample(model, encode(clip, "a <mimi> and a <rex>"), encode(clip, ""), batch=2)}
    show = pack["PerfusionWhere"].execute
    for image, shape in ((None, (4, 564, 512, 3)), (torch.rand(2, 60, 128, 3), (4, 592, 1152, 3))):
        maps = show(trace, samples, image).result[0]
        assert maps.shape == shape and maps.min() >= 0 and maps.max() <= 1
        assert not torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])
    with pytest.raises(ValueError, match="made 2 pictures and 3 came as image"):
        show(trace, samples, torch.rand(3, 64, 64, 3))
    plain, trace = pack["PerfusionTrace"].execute(w.model).result
    samples = {"samples": sample(plain, encode(w.clip, "a cat"), encode(w.clip, ""))}
    assert show(trace, samples).result[0].shape == (1, 564, 512, 3)


def test_in_the_demo_heat_lies_where_the_creature_is():
    """Of a picture whose mask is known, and on the side that the prompt says."""
    import numpy as np
    from PIL import Image

    from perfusion.bench import world as creatures
    from perfusion.core import demo_comfy
    from perfusion.core import domain as domains
    from perfusion.core.domain_comfy import encode_concept

    def draw(prompt, latents, denoise):
        made = comfy.sample.sample(
            model, comfy.sample.prepare_noise(latents, 3), 6, 4.0, "euler", "normal", encode(clip, prompt),
            encode(clip, ""), latents, denoise=denoise, seed=3, disable_pbar=True)
        return trace.of(made).heat[:, 0]

    model, clip, vae, vision = demo_comfy.load(DEMO)
    photo = torch.from_numpy(np.array(Image.open(DEMO / "pictures" / "mimi.png"), dtype=np.float32) / 255)[None]
    concept = encode_concept(domains.load(DEMO / "domains" / "creature.safetensors"), model, clip, vae, vision, photo,
                             "creature", "<mimi>", None, DEMO, lambda done, total: None)
    model, clip = applying.apply(model, clip, concept)
    model, trace = traced(model)

    left, right = (draw(f"a <mimi> {side}", torch.zeros(2, 16, 16, 16)[:, :vae.latent_channels], 1.0)
                   for side in ("on the left", "on the right"))
    shares = [heat[..., :8].sum((1, 2)) / heat.sum((1, 2)) for heat in (left, right)]
    assert shares[0].min() > 0.56 and shares[1].max() < 0.44

    generator = torch.Generator().manual_seed(0)
    context = creatures.contexts(4, generator, thing="none", style="flat", company="two")
    who = [creatures.identities(4, "train", kind, generator) for kind in ("creature", "house")]
    pictures, masks = creatures.render("creature", who[0], context, ("house", who[1]))
    latents, where = vae.encode(pictures.movedim(1, -1)), torch.nn.functional.adaptive_avg_pool2d(masks[:, 0], 16)
    hotter = []  # in how many of all pairs a place of the creature is hotter than one that is not
    for row, caption in enumerate(creatures.context_caption(context, "<mimi>", generator=generator)):
        heat, mask = draw(caption, latents[row : row + 1], 0.6)[0], where[row]
        hotter.append((heat[mask > 0.5][:, None] > heat[mask < 0.05]).float().mean().item())
    assert sum(hotter) / len(hotter) > 0.9


def test_heat_is_where_the_regions_are(world):
    w = world()
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    acting = [Acting(region=left), Acting(region=1 - left)]
    model, clip = apply(w, *(c.replace(acting=a) for c, a in zip((w.cat, w.dog), acting)))
    twin, trace = traced(model)
    words = encode(clip, "a <mimi> and a <rex>"), encode(clip, "")
    latents = sample(twin, *words)
    assert torch.equal(latents, sample(model, *words))
    cat, dog = trace.of(latents).heat[0]
    assert cat[:, :4].sum() > 5 * cat[:, 4:].sum() and dog[:, 4:].sum() > 5 * dog[:, :4].sum()


def test_heat_of_two_that_are_kept_apart_is_of_the_drawing_calls_alone(world):
    w = world()
    model, clip = apply(w, w.cat.kept_apart(True), w.dog.kept_apart(True))
    twin, trace = traced(model)
    words = encode(clip, "a <mimi> and a <rex>"), encode(clip, "")
    latents = sample(twin, *words, batch=2)
    assert torch.equal(latents, sample(model, *words, batch=2))
    joint, clip = apply(w, w.cat, w.dog)
    everywhere, other = traced(joint)
    heat, whole = trace.of(latents).heat, other.of(sample(everywhere, encode(clip, "a <mimi> and a <rex>"),
                                                          encode(clip, ""), batch=2)).heat
    assert heat.shape == whole.shape == (2, 2, 8, 8)
    assert 0 < heat.sum() < whole.sum()  # each acts in a part of what both acted in
