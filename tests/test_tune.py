"""Quick Tune against the real host: what is learnt and what is not, and that nothing else is touched.

Everything runs as in a prompt of ComfyUI: under inference mode, with a checkpoint that was loaded in it.
"""

import math
from contextlib import contextmanager
from dataclasses import replace

import comfy.lora
import comfy.model_management as memory
import comfy.model_sampling
import comfy.ops
import comfy.sd
import pytest
import torch

from perfusion.core import concept, host_comfy, tune
from perfusion.core.covariance import PACKAGED
from perfusion.core.fingerprint import exact
from perfusion.core.key_lock import edited
from perfusion.core.quick_tune import quick_tune
from perfusion.core.tune import Diverged, Lesson, Tuning, check, fit, schedule, what_is_wrong

pytestmark = pytest.mark.host

KINDS = "sd1", "sd2-v", "sdxl"
EVERY_OP = hasattr(comfy.ops, "run_every_op")  # does the host look for a cancel within a step?
CAT, MIMI = "cat", "<mimi>"
PICTURE = torch.rand(1, 64, 80, 3, generator=torch.Generator().manual_seed(7))
FAST = Tuning(steps=3, batch=2, resolution=64, templates=("a photo of a {}", "the {} on a chair", "a {}"))
STILL = replace(FAST, learning_rate=0.0, embedding_learning_rate=0.0)
SAMPLE = [(0, 1, 0.31), (0, 0, 0.77)]


@pytest.fixture(autouse=True)
def prompt():
    """A test runs as a prompt runs, and leaves no cancel behind."""
    with torch.inference_mode():
        yield
    memory.interrupt_current_processing(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where covariances are kept, with every 16th caption of the packaged ones."""
    folder = tmp_path_factory.mktemp("perfusion")
    lines = PACKAGED.read_text(encoding="utf-8").splitlines()
    (folder / "captions.txt").write_text("\n".join(lines[::16]), encoding="utf-8")
    return folder


@pytest.fixture
def host(tiny, folder):
    return lambda kind="sd1", **changes: host_over(*tiny(kind), folder, **changes)


def host_over(model, clip, vae, folder, **changes):
    return host_comfy.ComfyHost(model, clip, vae, CAT, folder, **changes)


def learn(host, settings=FAST, images=PICTURE, **more):
    return tune.tune(host, images, CAT, MIMI, settings, **more)


@contextmanager
def lesson_over(host, settings=STILL, images=PICTURE, start=None):
    """A lesson at its beginning, with latents and weights, while the host is ready for training."""
    embedding = start.embedding if start else host.embedding(CAT)
    (C_inv, _, _), latents = host.inverse_covariance(), host.latents(images)
    with host.training(latents[:1]):
        latents = latents.clone()
        yield Lesson(host, CAT, MIMI, embedding, C_inv, settings, start), latents, torch.ones_like(latents[:, :1])


def leaves(lesson):
    return {**lesson.embedding, **lesson.target_output}


def loss_by_hand(lesson, latents, weight, sample=SAMPLE, seed=0):
    """Mean of Σ m·error / Σ m over a sample, in one graph, with the noises that a step draws from this seed."""
    generator, losses = torch.Generator().manual_seed(seed), []
    for picture, template, t in sample:
        caption = lesson.settings.templates[template]
        context, _ = lesson.host.encode([caption.format(MIMI)], MIMI, lesson.embedding)
        x, noise = latents[picture : picture + 1], torch.randn(latents[:1].shape, generator=generator)
        with edited(lesson.host.projections, lesson.edit()):
            errors = lesson.host.errors(x, noise, torch.tensor([t]), context, caption.format(CAT))
        m = weight[picture : picture + 1].expand_as(errors)
        losses.append((m * errors).sum() / m.sum())
    return torch.stack(losses).mean()


def step(lesson, latents, weight, sample=SAMPLE, generator=None):
    """(loss, gradients that the optimiser was given) of one step, with i* put back."""
    found, before = {}, lesson.target_input
    hooks = [leaf.register_post_accumulate_grad_hook(lambda leaf, name=name: found.update({name: leaf.grad.clone()}))
             for name, leaf in leaves(lesson).items()]
    loss = lesson.step(latents, weight, sample, generator or torch.Generator().manual_seed(0))
    for hook in hooks:
        hook.remove()
    lesson.target_input = before
    return loss, found


def assert_close(found, expected, rtol):
    """Tensors by name agree in norm, each."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).norm() <= rtol * expected[name].norm(), name


def patched(model, clip, seed=1, strength=1.0, rank=2):
    """Model and CLIP with a random LoRA on every attention and MLP weight."""
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, comfy.lora.model_lora_keys_unet(model.model, {}))
    shapes = {key: w.shape for m in (model.model, clip.cond_stage_model) for key, w in m.state_dict().items()}
    keys = {key: name for name, key in names.items() if isinstance(key, str) and len(shapes.get(key, ())) == 2}
    generator, lora = torch.Generator().manual_seed(seed), {}
    for key, name in sorted(keys.items()):
        up, down = shapes[key]
        lora[f"{name}.lora_up.weight"] = torch.randn(up, rank, generator=generator) * 0.2
        lora[f"{name}.lora_down.weight"] = torch.randn(rank, down, generator=generator) / math.sqrt(down)
    model, clip = comfy.sd.load_lora_for_models(model, clip, lora, strength, strength)
    assert model.patches and clip.patcher.patches
    return model, clip


def forwards_left(host):
    roots = host.source.model, host.clip.patcher.model, host.vae.first_stage_model
    return [m for root in roots for m in root.modules() if "forward" in vars(m)]


class Snapshot:
    """All that a tune has to leave as it was: weights, an encoding and a picture, bit for bit."""

    def __init__(self, host):
        model, clip, vae = host.source, host.clip, host.vae
        self.encoding = clip.encode_from_tokens(clip.tokenize("a photo of a cat")).clone()
        self.picture = host_comfy.picture(model, clip, vae, "a photo of a cat", (8, 8), 1)
        roots = model.model, clip.patcher.model, vae.first_stage_model
        self.weights = [{name: exact(w) for name, w in root.state_dict().items()} for root in roots]

    def assert_same(self, host):
        now = Snapshot(host)
        assert self.weights == now.weights
        assert torch.equal(self.encoding, now.encoding) and torch.equal(self.picture, now.picture)
        assert not forwards_left(host)


# What is learnt


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_embeddings_get_gradient_and_nothing_else_does(host, kind):
    with lesson_over(host(kind)) as (lesson, latents, weight):
        _, gradients = step(lesson, latents, weight)
        values = {name for name in lesson.host.projections if name.endswith("to_v")}
        assert lesson.target_output.keys() == values and gradients.keys() == values | lesson.embedding.keys()
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())
        models = lesson.host.patcher.model, lesson.host.text
        assert not any(p.requires_grad or p.grad is not None for m in models for p in m.parameters())


def test_weights_get_no_gradient_when_loaded_outside_a_prompt(tiny, folder):
    with torch.inference_mode(False):
        parts = tiny("sd1")
    with lesson_over(host_over(*parts, folder)) as (lesson, latents, weight):
        step(lesson, latents, weight)
        models = lesson.host.patcher.model, lesson.host.text
        assert not any(p.requires_grad or p.grad is not None for m in models for p in m.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_gradient_of_the_loss(host, kind):
    with lesson_over(host(kind)) as (lesson, latents, weight):
        weight = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3))
        loss, gradients = step(lesson, latents, weight)
        by_hand = loss_by_hand(lesson, latents, weight)
        expected = dict(zip(leaves(lesson), torch.autograd.grad(by_hand, list(leaves(lesson).values()))))
        assert loss == pytest.approx(by_hand.item(), rel=1e-5)
        assert_close(gradients, expected, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(host, kind):
    with lesson_over(host(kind)) as (lesson, latents, weight):
        _, gradients = step(lesson, latents, weight)
        generator = torch.Generator().manual_seed(5)
        for name in (*lesson.embedding, list(lesson.target_output)[0], list(lesson.target_output)[-1]):
            leaf, g = leaves(lesson)[name], gradients[name]
            # half along the gradient, so that the loss moves by more than its rounding
            way = g / g.norm() + torch.nn.functional.normalize(torch.randn(g.shape, generator=generator), dim=-1)
            h, at, ends = 0.05 * leaf.detach().norm() / way.norm(), leaf.detach().clone(), []
            with torch.no_grad():
                for sign in (1, -1):
                    leaf.copy_(at + sign * h * way)
                    ends.append(loss_by_hand(lesson, latents, weight).double())
                leaf.copy_(at)
            assert ((ends[0] - ends[1]) / (2 * h)).item() == pytest.approx((g * way).sum().item(), rel=2e-2), name


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_the_networks_own_prediction(host, kind):
    host = host(kind)
    with lesson_over(host) as (_, latents, _):
        model, t = host.patcher.model, torch.tensor([0.4])
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(latents.shape, generator=generator)
        context, pooled = host.answer(host.clip.tokenize("a photo of a cat"))
        sigma = model.model_sampling.sigma(t * 999)
        signal = 1 / (1 + sigma**2).sqrt()
        adm = model.encode_adm(pooled_output=pooled, width=80, height=64, device="cpu") if kind == "sdxl" else None
        out = model.diffusion_model(signal * (latents + sigma * noise), (t * 999).round(), context=context, y=adm)
        target = noise if kind != "sd2-v" else signal * noise - signal * sigma * latents
        errors = host.errors(latents, noise, t, context, "a photo of a cat")
        assert host.prediction == ("v" if kind == "sd2-v" else "eps")
        assert (errors - (out - target) ** 2).norm() < 1e-3 * errors.norm()


def test_a_sampling_patch_decides_what_the_network_predicts(tiny, folder):
    model, clip, vae = tiny("sd1")
    model = v_prediction(model)
    assert host_over(model, clip, vae, folder).prediction == "v"


def v_prediction(model, kind="V_PREDICTION"):
    """As the stock node ModelSamplingDiscrete does it."""
    kinds = comfy.model_sampling.ModelSamplingDiscrete, getattr(comfy.model_sampling, kind)
    model = model.clone()
    model.add_object_patch("model_sampling", type("ModelSamplingAdvanced", kinds, {})(model.model.model_config))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_on_the_picture(host, kind):
    settings = replace(FAST, batch=1, learning_rate=0.1, embedding_learning_rate=0.02)  # random weights: little depends
    with lesson_over(host(kind), settings) as (lesson, latents, weight):
        fixed = [(0, k % 3, (k + 0.5) / 8) for k in range(8)]
        with torch.no_grad():
            before = loss_by_hand(lesson, latents, weight, fixed, seed=9)
        generator = torch.Generator().manual_seed(1)
        for sample in schedule(replace(settings, steps=30), 1, generator):
            lesson.step(latents, weight, sample, generator)
        with torch.no_grad():
            assert loss_by_hand(lesson, latents, weight, fixed, seed=9) < 0.999 * before


def test_the_target_input_moves_by_its_moving_average_alone(host):
    with lesson_over(host(), FAST) as (lesson, latents, weight):
        expected = first = lesson.target_input.clone()
        generator = torch.Generator().manual_seed(0)
        for turn in range(2):
            lesson.step(latents, weight, SAMPLE, generator)  # and then the word is read anew, in other frames
            prompts = [frame.format(MIMI) for frame in lesson.frames[4 * turn : 4 * turn + 4]]
            context, at = lesson.host.encode(prompts, MIMI, lesson.embedding)
            expected = 0.99 * expected + 0.01 * sum(context[k, at[k]] for k in range(4)).detach() / 4
        assert not lesson.target_input.requires_grad and not torch.equal(first, lesson.target_input)
        torch.testing.assert_close(lesson.target_input, expected)
        assert torch.equal(lesson.key_input, first)


def test_many_updates_towards_one_encoding_have_their_closed_form(host):  # P10
    with lesson_over(host()) as (lesson, latents, weight):
        lesson.frames = ["the {} on a chair"]
        first, n = lesson.target_input, 4
        context, (at,) = lesson.host.encode(["the <mimi> on a chair"], MIMI, lesson.embedding)
        for _ in range(n):
            lesson.step(latents, weight, [(0, 1, 0.4)], torch.Generator().manual_seed(0))
        expected = 0.99**n * first + (1 - 0.99**n) * context.detach()[0, at]
        assert not torch.allclose(first, expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(lesson.target_input, expected, rtol=0, atol=1e-5)


def test_the_start_is_the_superclass(host):
    host = host()
    with lesson_over(host) as (lesson, _, _):
        assert torch.equal(lesson.embedding["clip_l"], host.embedding(CAT)["clip_l"])
        tokens = [host.clip.tokenize(frame.format(CAT)) for frame in host.frames()]
        places = [[t for t, _ in found["l"][0]].index(host.ids["clip_l"]) for found in tokens]
        mean = torch.stack([host.answer(found)[0][0, at] for found, at in zip(tokens, places)]).mean(0)
        torch.testing.assert_close(lesson.target_input, mean)
        for name, output in lesson.target_output.items():
            torch.testing.assert_close(output[0], host.projections[name].weight @ mean)


def test_the_word_is_as_similar_to_itself_in_other_prompts_as_in_its_frames(host):
    """By construction: the mean over the frames of the similarity to their mean is 1."""
    host = host()
    with lesson_over(host) as (lesson, _, _), torch.no_grad():
        context, at = host.encode([f.format(MIMI) for f in host.frames()], MIMI, lesson.embedding)
        similarity = context[torch.arange(len(at)), at] @ lesson.edit().direction[0]
        assert similarity.mean().item() == pytest.approx(1, abs=1e-3)


def test_without_captions_of_anything_the_templates_are_the_frames(host, tmp_path):
    (tmp_path / "captions.txt").write_text("".join(f"{k} and {k + 1}\n" for k in range(300)))
    host = host()
    host.folder = tmp_path
    assert host.frames() == []
    with lesson_over(host) as (lesson, _, _):
        assert lesson.frames == list(STILL.templates)


@pytest.mark.parametrize("kind", ("sd1-inpaint", "sdxl-inpaint", "sdxl-v"))
def test_variants_of_a_family_learn_too(host, kind):
    assert learn(host(kind)).training["steps"] == 3


@pytest.mark.parametrize("base", ("ModelSamplingContinuousEDM", "ModelSamplingDiscreteDistilled"))
def test_other_samplings_are_learnt_over_their_own_range_of_noise(tiny, folder, base):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscreteDistilled

    model, clip, vae = tiny("sdxl")
    kinds = {"ModelSamplingDiscreteDistilled": (ModelSamplingDiscreteDistilled, comfy.model_sampling.EPS),
             "ModelSamplingContinuousEDM": (comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EDM)}
    sampling = type("Sampling", kinds[base], {})(model.model.model_config)
    model.add_object_patch("model_sampling", sampling)
    host, seen = host_over(model, clip, vae, folder), []
    scaling = sampling.noise_scaling
    sampling.noise_scaling = lambda sigma, *args: (seen.append(sigma.item()), scaling(sigma, *args))[1]
    learnt = learn(host, replace(FAST, steps=8))
    assert math.isfinite(learnt.training["loss"][-1])
    assert min(seen) < 0.3 and max(seen) > 0.1 * min(float(sampling.sigma_max), 15)


def test_a_kernel_of_attention_without_gradient_is_not_learnt_through(host, monkeypatch):
    from comfy.ldm.modules import attention

    plain = learn(host())

    @attention.wrap_attn
    def flash(*args, **kwargs):
        return attention.attention_pytorch(*args, **kwargs).detach()

    monkeypatch.setattr(attention, "optimized_attention", flash)
    assert concept.dump(learn(host())) == concept.dump(plain)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_learns_nearly_the_same(tiny, folder, dtype):
    full = learn(host_over(*tiny("sd1"), folder))
    model, clip, vae = tiny("sd1")
    model.set_model_compute_dtype(dtype)
    host = host_over(model, clip, vae, folder)
    assert host.dtype == dtype
    half = learn(host)
    for name, o in full.target_output.items():
        assert o.isfinite().all() and torch.cosine_similarity(o, half.target_output[name], dim=0) > 0.98
        assert not torch.equal(o, half.target_output[name])


def test_little_memory_chooses_checkpointing_and_learns_the_same(host, monkeypatch):
    plain = learn(host())
    monkeypatch.setattr(host_comfy, "TRAINING_OVER_SAMPLING", 10**9)
    tight, found = host(), []
    blocks = [m for m in tight.source.model.modules() if type(m).__name__ == "BasicTransformerBlock"]
    learnt = learn(tight, report=lambda progress: found.append(all("forward" in vars(b) for b in blocks)))
    assert found == [True] * FAST.steps and not forwards_left(tight)
    for name, o in plain.target_output.items():
        assert (learnt.target_output[name] - o).norm() < 1e-3 * o.norm()


def test_captions_may_hold_braces_of_their_own(host):
    learnt = learn(host(), replace(FAST, templates=("a {red|blue} {}", "{} {0}")))
    assert learnt.training["steps"] == FAST.steps


def test_a_caption_that_holds_the_word_itself_gets_a_sentence(host):
    with pytest.raises(ValueError, match="2 times, and once is needed"):
        learn(host(), replace(FAST, templates=("<mimi> and a {}",)))


def test_a_small_batch_is_not_taken_for_divergence():
    """Losses that rise 14-fold from high to low noise, as a denoiser's of photographs do, in the order they are met."""
    settings = replace(FAST, steps=100, batch=1)
    for seed in range(40):
        rows = schedule(settings, 1, torch.Generator().manual_seed(seed))
        losses = [0.01 + 0.13 * (1 - t) ** 6 for ((_, _, t),) in rows]
        assert not any(what_is_wrong(losses[: k + 1], 24) for k in range(len(losses)))


# Repeatability and batches


def test_a_seed_decides_the_file(host):
    files = [concept.dump(learn(host(), replace(FAST, seed=seed))) for seed in (0, 0, 1)]
    assert files[0] == files[1] != files[2]


def test_a_batch_has_the_mean_gradient(host):
    with lesson_over(host("sdxl")) as (lesson, latents, weight):
        loss, both = step(lesson, latents, weight)
        generator = torch.Generator().manual_seed(0)
        (one, first), (two, second) = (step(lesson, latents, weight, [s], generator) for s in SAMPLE)
        assert loss == pytest.approx((one + two) / 2, rel=1e-5)
        assert_close(both, {name: (first[name] + second[name]) / 2 for name in both}, 1e-4)


@pytest.mark.parametrize("lora", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient_and_leaves_no_forward(tiny, folder, kind, lora):
    model, clip, vae = tiny(kind)
    model, clip = patched(model, clip) if lora else (model, clip)
    host = host_over(model, clip, vae, folder)
    with lesson_over(host) as (lesson, latents, weight):
        _, plain = step(lesson, latents, weight)
        with host_comfy.checkpointed(host.patcher.model.diffusion_model):
            assert forwards_left(host)
            _, again = step(lesson, latents, weight)
        assert_close(again, plain, 1e-4)
        assert not forwards_left(host)


def test_a_block_that_is_computed_again_knows_its_place(host):
    """A replacement of cross-attention that acts by the block's place gets the same gradients with checkpointing."""
    seen = []

    def replacement(q, k, v, extra_options):
        seen.append(extra_options["block"])
        share = 0.1 * (1 + len({str(b) for b in seen[: seen.index(extra_options["block"])]}))
        return (q * k.mean(1, keepdim=True)).sigmoid() * v.mean(1, keepdim=True) * share

    host = host()
    with lesson_over(host) as (_, latents, _):
        model = host.patcher.model
        places = [(*place, 0) for place in (("input", 1), ("input", 3), ("middle", 0), ("output", 0), ("output", 2))]
        patches = {place: replacement for block in places for place in (block, block[:2])}
        context = host.answer(host.clip.tokenize("a cat"))[0].clone().requires_grad_()

        def gradient():
            options = {"patches_replace": {"attn2": dict(patches)}}
            out = model.apply_model(latents, torch.ones(1), c_crossattn=context, transformer_options=options)
            return torch.autograd.grad(out.square().sum(), context)[0]

        plain = gradient()
        assert len(set(seen)) > 2  # the patches act, in several blocks
        with host_comfy.checkpointed(model.diffusion_model):
            assert_close({"context": gradient()}, {"context": plain}, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_step_has_the_same_gradient_after_others(host, kind):
    settings = replace(STILL, batch=1)
    with lesson_over(host(kind), settings) as (lesson, latents, weight):
        _, first = step(lesson, latents, weight)
        generator = torch.Generator().manual_seed(1)
        for sample in schedule(replace(settings, steps=10), 1, generator):
            _, one = step(lesson, latents, weight, sample, torch.Generator().manual_seed(2))
            by_hand = loss_by_hand(lesson, latents, weight, sample, seed=2)
            assert_close(one, dict(zip(one, torch.autograd.grad(by_hand, [leaves(lesson)[n] for n in one]))), 1e-3)
        assert_close(step(lesson, latents, weight)[1], first, 1e-6)


def test_checkpointing_gives_back_a_forward_that_was_there(host):
    host = host()
    unet = host.source.model.diffusion_model
    block = next(m for m in unet.modules() if type(m).__name__ == "ResBlock")
    block.forward = mine = block.forward
    with host_comfy.checkpointed(unet):
        assert block.forward is not mine
    assert vars(block)["forward"] is mine


def test_patches_of_attention_do_not_reach_learning(tiny, folder):
    model, clip, vae = tiny("sd1")
    other = model.clone()
    for block in (("input", 1), ("input", 3), ("middle", 0)):
        other.set_model_attn2_replace(lambda q, k, v, extra_options: q * 0, *block)
    one, two = (concept.dump(learn(host_over(m, clip, vae, folder))) for m in (model, other))
    assert one == two


# Pictures and masks


def test_a_mask_that_is_full_changes_nothing_and_one_that_is_not_does(host):
    full = torch.ones(1, *PICTURE.shape[1:3])
    half = full.clone()
    half[:, :, :40] = 0
    host = host()
    plain, same, other = (learn(host, mask=mask) for mask in (None, full, half))
    assert_close(same.target_output, plain.target_output, 1e-4)
    assert same.training["mask"] and not plain.training["mask"]
    assert any(not torch.allclose(o, plain.target_output[name]) for name, o in other.target_output.items())


def test_mirror_doubles_the_pictures(host):
    host = host()
    mirrored = learn(host, replace(FAST, mirror=True))
    both = learn(host, images=torch.cat([PICTURE, PICTURE.flip(2)]))
    assert mirrored.training["pictures"] == both.training["pictures"] == 2
    assert_close(mirrored.target_output, both.target_output, 1e-4)


def test_a_mask_is_mirrored_with_its_picture(host):
    host = host()
    mask = torch.zeros(1, *PICTURE.shape[1:3])
    mask[:, :30, :30] = 1
    mirrored = learn(host, replace(FAST, mirror=True), mask=mask)
    both = learn(host, images=torch.cat([PICTURE, PICTURE.flip(2)]), mask=torch.cat([mask, mask.flip(2)]))
    assert_close(mirrored.target_output, both.target_output, 1e-4)


def test_several_portraits_share_one_mask(host):
    images = torch.rand(3, 144, 96, 3, generator=torch.Generator().manual_seed(1))
    learnt = learn(host(), replace(FAST, resolution=128), images, mask=torch.ones(1, 144, 96))
    assert learnt.training["pictures"] == 3


@pytest.mark.parametrize("height, width", ((64, 64), (1200, 800), (800, 1200), (3000, 1000), (512, 512), (77, 640)))
def test_fit_keeps_area_and_shape(height, width):
    _, h, w, channels = fit(torch.rand(2, height, width, 3), 512).shape
    assert channels == 3 and h % 64 == w % 64 == 0
    assert h * w == pytest.approx(512**2, rel=0.2)
    assert math.log(h / w) == pytest.approx(math.log(height / width), abs=0.3)


def test_fit_stays_within_the_range_of_a_picture():
    black_and_white = (torch.rand(1, 200, 100, 3) > 0.5).float()
    fitted = fit(black_and_white, 256)
    assert 0 <= fitted.min() and fitted.max() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_any_run_of_times_is_spread_evenly(seed):
    samples = schedule(Tuning(steps=40, batch=5), 3, torch.Generator().manual_seed(seed))
    times = torch.tensor([t for batch in samples for _, _, t in batch], dtype=torch.float64)
    assert len(samples) == 40 and all(len(batch) == 5 for batch in samples) and 0 <= times.min() and times.max() < 1
    for n in (4, 7, 16, 50, 200):
        for i in range(0, len(times) - n + 1, 3):
            run = times[i : i + n].sort().values
            gaps = torch.cat([run[1:], run[:1] + 1]) - run
            assert gaps.max() <= 2 / n
            above, below = torch.arange(1, n + 1) / n - run, run - torch.arange(n) / n
            assert torch.maximum(above, below).max() <= (1.6 + math.log(n) / 4) / n  # random: about .87/√n


def test_pictures_and_captions_take_turns():
    samples = schedule(Tuning(steps=11, batch=4, templates=("{}",) * 5), 3, torch.Generator().manual_seed(0))
    for column, choices in ((0, 3), (1, 5)):
        counts = torch.bincount(torch.tensor([sample[column] for batch in samples for sample in batch]))
        assert len(counts) == choices and counts.max() - counts.min() <= 1


# Going on


def test_learning_goes_on_from_a_file(host, tmp_path):
    host = host("sdxl")
    saved = learn(host)
    loaded = concept.load(concept.save(saved, tmp_path / "mimi.safetensors"))
    with lesson_over(host, start=loaded) as (lesson, _, _):
        begun = lesson.learnt()
    for name in ("embedding", "target_output"):
        assert_close(begun[name], getattr(saved, name), 1e-3)  # the file is fp16
    for name in ("target_input", "key_input", "direction"):
        assert_close({name: begun[name]}, {name: getattr(saved, name)}, 5e-3)
    further = learn(host, start=loaded)
    assert further.training["steps"] == 3 and torch.equal(further.key_input, loaded.key_input)
    assert not torch.equal(further.embedding["clip_g"], loaded.embedding["clip_g"])


def test_a_start_of_another_family_is_refused_before_any_work(tiny, folder, host):
    start = learn(host("sdxl"))
    with pytest.raises(ValueError, match="was made for SDXL, the connected model is SD1.5"):
        quick_tune(*tiny("sd1"), PICTURE, CAT, MIMI, FAST, None, start, folder, watch=None, keep=None)


@pytest.mark.parametrize("lora", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_learning_leaves_the_model_as_it_was(tiny, folder, kind, lora):
    model, clip, vae = tiny(kind)
    plain = host_over(model, clip, vae, folder)
    base = Snapshot(plain)
    if not lora:
        learn(plain)
        return base.assert_same(plain)
    host = host_over(*patched(model, clip), vae, folder)
    before = Snapshot(host)
    assert not torch.equal(before.picture, base.picture)
    learn(host)
    before.assert_same(host)
    base.assert_same(plain)


def test_a_lora_that_was_never_loaded_before_is_learnt_under(tiny, folder):
    model, clip, vae = tiny("sd1")
    plain = learn(host_over(model, clip, vae, folder))
    with_lora = learn(host_over(*patched(model, clip), vae, folder))
    assert not torch.allclose(plain.target_input, with_lora.target_input, rtol=1e-2)


# Cancel


@pytest.mark.parametrize("lora", (False, True))
@pytest.mark.parametrize("moment", ("before", "between", "encoding", "within"))
def test_a_cancel_keeps_the_last_good_concept_and_leaves_the_model_as_it_was(tiny, folder, moment, lora):
    model, clip, vae = tiny("sd1")
    model, clip = patched(model, clip) if lora else (model, clip)
    host, settings = host_over(model, clip, vae, folder), replace(FAST, steps=6)
    host.inverse_covariance()
    before, kept, calls, steps = Snapshot(host), [], [], []
    unet = model.model.diffusion_model

    def cancel(*_):
        calls.append(moment)
        if len(steps) == 2:
            memory.interrupt_current_processing(True)

    def report(progress):
        steps.append(progress.step)
        if moment == "between":
            cancel()

    middle = {"encoding": clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[1].mlp,
              "within": unet.middle_block[1].transformer_blocks[0].attn2.to_v}.get(moment)
    hook = middle and middle.register_forward_pre_hook(cancel)
    if moment == "before":
        memory.interrupt_current_processing(True)
    with pytest.raises(memory.InterruptProcessingException):
        learn(host, settings, report=report, keep=lambda learnt: kept.append(learnt) or "a file")
    if hook:
        hook.remove()
    assert not memory.processing_interrupted()
    before.assert_same(host)
    if moment == "before":
        assert not kept and not steps
    else:
        assert [k.training["steps"] for k in kept] == [2] == steps[-1:] and calls
        assert kept[0].training["loss"][0] > 0 and concept.parse(concept.dump(kept[0]), "kept")


def test_a_cancel_on_the_way_back_leaves_the_model_as_it_was(host):
    host, calls = host(), []
    before = Snapshot(host)
    unet = host.source.model.diffusion_model
    middle = unet.middle_block[1].transformer_blocks[0].attn2.to_v

    def cancel(*_):
        calls.append("there" if not calls else "back")
        memory.interrupt_current_processing("back" in calls)

    with pytest.raises(memory.InterruptProcessingException):
        with lesson_over(host) as (lesson, latents, weight), host_comfy.checkpointed(unet):
            hook = middle.register_forward_pre_hook(cancel)
            lesson.step(latents, weight, SAMPLE[:1], torch.Generator().manual_seed(0))
            assert not EVERY_OP
            host.check()
    hook.remove()
    assert calls == ["there", "back"]
    before.assert_same(host)


def test_another_error_keeps_the_last_good_concept_too(host):
    def report(progress):
        if progress.step == 2:
            raise OSError("the disk is gone")

    kept, host = [], host()
    with pytest.raises(OSError, match="the disk is gone"):
        learn(host, report=report, keep=lambda learnt: kept.append(learnt) or "a file")
    assert kept[0].training["steps"] == 2 and not forwards_left(host)


def test_progress_tells_steps_losses_and_the_time_left(host):
    heard = []
    learn(host(), report=heard.append)
    assert [p.step for p in heard] == [1, 2, 3] and {p.steps for p in heard} == {3}
    assert [len(p.losses) for p in heard] == [1, 2, 3] and heard[-1].seconds_left == 0 < heard[0].seconds_left


# Divergence


@pytest.mark.parametrize("losses, says", (
    ([0.5], ""), ([math.nan], "not a number"), ([0.5, math.inf], "not a number"), ([0.1] * 5 + [0.3] * 5, ""),
    ([0.1] * 5 + [0.5] * 5, "has grown from 0.100 to 0.500"), ([0.1, 0.1, 0.1, 9.0], ""), ([1.0] * 60 + [0.1] * 5, ""),
))
def test_what_is_wrong_with_losses(losses, says):
    assert says in what_is_wrong(losses) and bool(says) == bool(what_is_wrong(losses))


def test_a_picture_without_numbers_diverges_at_the_first_step(host):
    host, kept = host(), []
    before = Snapshot(host)
    with pytest.raises(Diverged, match="step 1 of 3: the loss is not a number.*Queue again with fewer steps"):
        learn(host, images=PICTURE * math.nan, keep=lambda learnt: kept.append(learnt) or "a file")
    assert not kept
    before.assert_same(host)


@pytest.mark.parametrize("rates", ({"learning_rate": 1e6}, {"embedding_learning_rate": 1e6}, {"learning_rate": 3e4}))
def test_a_rate_far_too_high_diverges_and_what_is_kept_is_good(host, rates):
    host, kept = host(), []
    before = Snapshot(host)
    with pytest.raises(Diverged, match=r"Learning stopped at step \d+ of 30: .*Queue again with fewer steps"):
        learn(host, replace(FAST, steps=30, batch=1, **rates), keep=lambda learnt: kept.append(learnt) or "a file")
    for learnt in kept:
        concept.parse(concept.dump(learnt), "kept")
    before.assert_same(host)


def test_one_bad_picture_among_good_ones_keeps_what_was_learnt_before_it(host):
    images = torch.cat([PICTURE, PICTURE, PICTURE * math.nan])
    order = [p for batch in schedule(replace(FAST, batch=1), 3, torch.Generator().manual_seed(1)) for p, _, _ in batch]
    assert order.index(2) == 2, "another seed is needed"
    kept = []
    with pytest.raises(Diverged, match="step 3 of 3: the loss is not a number.*is kept in a file"):
        learn(host(), replace(FAST, batch=1, seed=1), images, keep=lambda learnt: kept.append(learnt) or "a file")
    assert [learnt.training["steps"] for learnt in kept] == [2]


# Bad input


@pytest.mark.parametrize("changes, says", (
    ({"images": None}, "needs a picture"),
    ({"images": PICTURE[:0]}, "needs a picture"),
    ({"images": PICTURE[:, :1, :1]}, "is 1×1 pixels"),
    ({"images": torch.rand(1, 64, 64, 4)}, "has 4 channels"),
    ({"mask": torch.ones(1, 32, 80)}, "mask is 80×32 .1., the picture 80×64"),
    ({"mask": torch.ones(2, 64, 80)}, "mask is 80×64 .2., the picture 80×64 .1."),
    ({"mask": torch.ones(64, 80)}, "mask is"),
    ({"mask": torch.zeros(1, 64, 80)}, "mask is empty"),
    ({"steps": 0}, "at least one step"),
    ({"batch": 0}, "at least one step and a batch of one"),
    ({"resolution": 8}, "at least 64 pixels"),
    ({"templates": ("a photo of a cat",)}, "exactly once.*'a photo of a cat'"),
    ({"templates": ("a {}", "a {} and a {}")}, "exactly once.*'a {} and a {}'"),
    ({"templates": ()}, "exactly once.*no caption"),
    ({"word": "mimi"}, "angle brackets.*try '<mimi>'"),
    ({"word": "cat"}, "angle brackets"),
    ({"superclass": ""}, "one plain word"),
    ({"superclass": "big cat"}, "one plain word.*'big cat'"),
    ({"superclass": "pteranodon"}, "pieces"),
    ({"templates": ("a " * 80 + "{}",)}, "too long"),
    ({"templates": ("a {}", "a " * 75 + "{}")}, "too long"),
))
def test_bad_input_gets_a_sentence(tiny, folder, changes, says):
    model, clip, vae = tiny("sd1")
    arguments = {"images": PICTURE, "mask": None, "word": MIMI, "superclass": CAT} | changes
    settings = replace(FAST, **{name: v for name, v in changes.items() if hasattr(FAST, name)})

    def run():
        host = host_comfy.ComfyHost(model, clip, vae, arguments["superclass"], folder)
        return tune.tune(host, arguments["images"], arguments["superclass"], arguments["word"], settings,
                         arguments["mask"])

    with pytest.raises(ValueError, match=says):
        run()


def test_the_word_may_be_the_last_that_a_caption_has_room_for(host):
    assert learn(host(), replace(FAST, templates=("a " * 74 + "{}",))).training["steps"] == 3


def test_a_caption_that_is_too_long_for_a_start_keeps_what_was_learnt(host):
    host, kept = host(), []
    settings = replace(FAST, batch=1, templates=("a {}", "the {}", "a " * 80 + "{}"))
    start = learn(host)
    with pytest.raises(ValueError, match="too long"):
        learn(host, settings, start=start, keep=lambda learnt: kept.append(learnt) or "a file")
    assert all(k.training["steps"] < 3 for k in kept)


@pytest.mark.parametrize("none", (None, PICTURE[:0]))
def test_no_picture_gets_a_sentence(none):
    with pytest.raises(ValueError, match="needs a picture"):
        check(none, None, FAST)


def test_check_accepts_one_mask_for_all_and_one_each():
    images = torch.rand(3, 64, 64, 3)
    for masks in (None, torch.ones(1, 64, 64), torch.ones(3, 64, 64)):
        check(images, masks, Tuning())


# The key under which a result is found again


def test_the_key_is_the_same_for_the_same_inputs_and_for_no_others(tiny):
    model, clip, vae = tiny("sd1")
    key = host_comfy.tune_key(model, clip, vae, PICTURE, CAT, 0)
    assert key == host_comfy.tune_key(*tiny("sd1"), PICTURE.clone(), CAT, 0)
    keys = [key, host_comfy.tune_key(model, clip, vae, PICTURE, CAT, 1)]
    keys += [host_comfy.tune_key(model, clip, vae, PICTURE, "dog", 0)]
    keys += [host_comfy.tune_key(*patched(model, clip, strength=s), vae, PICTURE, CAT, 0) for s in (0.5, 1.0)]
    keys += [host_comfy.tune_key(*patched(model, clip, seed=2), vae, PICTURE, CAT, 0)]
    skipping = clip.clone()
    skipping.clip_layer(-2)
    keys += [host_comfy.tune_key(model, skipping, vae, PICTURE, CAT, 0)]
    for kind in ("EPS", "V_PREDICTION"):
        keys += [host_comfy.tune_key(v_prediction(model, kind), clip, vae, PICTURE, CAT, 0)]
    for part in range(3):
        changed = tiny("sd1")
        root = (changed[0].model, changed[1].cond_stage_model, changed[2].first_stage_model)[part]
        max(root.parameters(), key=torch.numel).data.mul_(1.01)
        keys += [host_comfy.tune_key(*changed, PICTURE, CAT, 0)]
    assert len(set(keys)) == len(keys) and None not in keys


def test_one_pixel_of_a_picture_or_of_a_mask_changes_the_key(tiny):
    parts = tiny("sd1")
    picture, mask = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 512, 512)
    keys = {host_comfy.tune_key(*parts, picture, mask)}
    for tensor in (picture, mask):
        tensor[0, 101, 333] = 0.5
        keys.add(host_comfy.tune_key(*parts, picture, mask))
    assert len(keys) == 3


@pytest.mark.parametrize("lora", (False, True))
def test_the_key_does_not_see_what_is_loaded(tiny, folder, lora):
    model, clip, vae = tiny("sd1")
    model, clip = patched(model, clip) if lora else (model, clip)
    key = host_comfy.tune_key(model, clip, vae)
    learn(host_over(model, clip, vae, folder))
    assert host_comfy.tune_key(model, clip, vae) == key
    memory.load_models_gpu([model, clip.patcher], force_full_load=True)
    assert host_comfy.tune_key(model, clip, vae) == key == host_comfy.tune_key(model.clone(), clip.clone(), vae)
    memory.unload_all_models()
    assert host_comfy.tune_key(model, clip, vae) == key


def test_what_cannot_be_hashed_has_no_key(tiny):
    model, clip, vae = tiny("sd1")
    foreign = model.clone()
    foreign.add_object_patch("diffusion_model.out", torch.nn.Identity())
    assert host_comfy.tune_key(foreign, clip, vae) is None
    wrapped = model.clone()
    wrapped.add_wrapper_with_key("apply_model", "other", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    assert host_comfy.tune_key(wrapped, clip, vae) is None
    weighed, spoken = model.clone(), clip.clone()
    weighed.add_weight_wrapper("diffusion_model.out.2.weight", torch.nn.Identity())
    spoken.patcher.set_injections("bypass", [])
    assert host_comfy.tune_key(weighed, clip, vae) is None is host_comfy.tune_key(model, spoken, vae)
