"""Quick Tune against the real host: what is learnt and what is not.

Everything runs as in a prompt of ComfyUI: under inference mode, with a checkpoint that was loaded in it.
"""

import math
from dataclasses import replace

import comfy.model_sampling
import pytest
import torch

from perfusion.core import concept, host_comfy
from perfusion.core.tune import schedule

import tuning
from tuning import (
    CAT,
    FAST,
    KINDS,
    MIMI,
    SAMPLE,
    STILL,
    assert_close,
    forwards_left,
    host_over,
    learn,
    leaves,
    lesson_over,
    loss_by_hand,
    step,
    v_prediction,
)

pytestmark = pytest.mark.host

folder, host, prompt = tuning.folder, tuning.host, tuning.prompt  # fixtures


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
    monkeypatch.setattr(host_comfy, "MARGIN", 10**9)
    tight, found = host(), []
    blocks = [m for m in tight.source.model.modules() if type(m).__name__ == "BasicTransformerBlock"]
    learnt = learn(tight, report=lambda progress: found.append(all("forward" in vars(b) for b in blocks)))
    assert found == [True] * FAST.steps and not forwards_left(tight)
    for name, o in plain.target_output.items():
        assert (learnt.target_output[name] - o).norm() < 1e-3 * o.norm()
