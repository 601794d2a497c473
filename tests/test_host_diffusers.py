"""The diffusers host on a random miniature: what is learnt, read and made, and that the pipeline stays as it was."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from perfusion.bench import mini_models, world
from perfusion.core import host_diffusers as hd
from perfusion.core.concept import dump
from perfusion.core.host_diffusers import DiffusersHost, encode_prompts, pictures
from perfusion.core.joint_edit import JointEdit
from perfusion.core.key_lock import TRAIN_BIAS, TRAIN_TEMPERATURE, edited
from perfusion.core.tune import Tuning, tune

CREATURE, MIMI, REX = "creature", "<mimi>", "<rex>"
FAST = Tuning(steps=2, batch=2, resolution=64, templates=("a photo of a {}", "a {} beside a house"))
PICTURE = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(7))
SMALL = dict(steps=2, size=(64, 64))
SD = dict(block_out_channels=(320, 640, 1280, 1280), layers_per_block=2)
SDXL = dict(
    block_out_channels=(320, 640, 1280), layers_per_block=2, transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
)


@pytest.fixture(scope="module")
def folder(miniature, tmp_path_factory):
    lines = world.sample(40, torch.Generator().manual_seed(1))["captions"]
    return miniature(tmp_path_factory.mktemp("demo"), lines)


@pytest.fixture(scope="module")
def pipe(folder):
    return hd.load(folder)


@pytest.fixture(scope="module")
def host(pipe, folder):
    return DiffusersHost(pipe, CREATURE, folder)


@pytest.fixture(scope="module")
def mimi(host):
    return tune(host, PICTURE, CREATURE, MIMI, FAST)


@pytest.fixture(scope="module")
def rex(pipe, folder):
    return tune(DiffusersHost(pipe, "house", folder), PICTURE.flip(1), "house", REX, FAST)


def modules(pipe):
    return pipe.unet, pipe.text_encoder, pipe.vae


def state(pipe):
    weights = [(w.clone(), w.requires_grad) for m in modules(pipe) for w in m.parameters()]
    traces = [(sorted(vars(m)), len(m._forward_hooks)) for root in modules(pipe) for m in root.modules()]
    return weights, traces


def same(one, other):
    return one[1] == other[1] and all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(one[0], other[0]))


def test_a_tune_learns_and_leaves_the_pipeline_bit_for_bit(pipe, host):
    before = state(pipe)
    losses = []
    learnt = tune(host, PICTURE, CREATURE, MIMI, FAST, report=lambda progress: losses.append(progress.losses[-1]))
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert same(before, state(pipe))
    assert learnt.base == "creature" and learnt.prediction == "v"
    plain = host.embedding(CREATURE)["clip_l"]
    assert 0 < (learnt.embedding["clip_l"] - plain).abs().max() <= 2.1 * FAST.embedding_learning_rate
    i = learnt.target_input
    for name, o in learnt.target_output.items():
        assert 0 < (o - host.projections[name].weight.detach() @ i).abs().max() < 2.1 * FAST.learning_rate, name


def test_an_error_while_learning_leaves_the_pipeline_bit_for_bit(pipe, host):
    before = state(pipe)

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(host, PICTURE, CREATURE, MIMI, FAST, report=stop)
    assert same(before, state(pipe))


def test_the_same_seed_gives_the_same_concept_and_another_seed_another(host, mimi):
    assert dump(tune(host, PICTURE, CREATURE, MIMI, FAST)) == dump(mimi)
    assert dump(tune(host, PICTURE, CREATURE, MIMI, replace(FAST, seed=1))) != dump(mimi)


def test_what_is_learnt_makes_the_error_on_the_picture_smaller(pipe, host):
    latents, generator = host.latents(PICTURE).expand(32, -1, -1, -1), torch.Generator().manual_seed(9)
    noise, times = torch.randn(latents.shape, generator=generator), torch.arange(32) / 32

    def error(steps):
        learnt = tune(host, PICTURE, CREATURE, MIMI, replace(FAST, steps=steps)).raw(TRAIN_BIAS, TRAIN_TEMPERATURE)
        context, at = encode_prompts(pipe, [f"a photo of a {MIMI}"], [learnt])
        present = at.amax(1)
        with torch.no_grad(), edited(host.projections, JointEdit((learnt,))(present)):
            return host.errors(latents, noise, times, context.expand(32, -1, -1), "a photo of a creature").mean()

    assert error(20) < 0.97 * error(1)


def test_the_superclass_vector_at_the_word_is_the_superclass_word(pipe, host):
    x, at = host.encode([f"a red {MIMI}, big", f"{MIMI}"], MIMI, host.embedding(CREATURE))
    plain, _ = encode_prompts(pipe, [f"a red {CREATURE}, big", CREATURE])
    assert torch.equal(x, plain) and at.tolist() == [3, 1]


def test_gradients_reach_the_word_and_are_those_of_differences(host):
    v = host.embedding(CREATURE)["clip_l"].requires_grad_()
    weigh = torch.randn(77, 128, generator=torch.Generator().manual_seed(0))
    step = torch.randn(128, generator=torch.Generator().manual_seed(1)) * v.detach().std() * 0.1

    def answer(vector):
        return (host.encode([f"a {MIMI}, big"], MIMI, {"clip_l": vector})[0][0] * weigh).sum()

    slope, = torch.autograd.grad(answer(v), v)
    with torch.no_grad():
        difference = (answer(v + step) - answer(v - step)) / 2
    assert abs(slope @ step - difference) < 0.02 * abs(difference)


@pytest.mark.parametrize("prompt, says", [
    (f"a {MIMI} and a {MIMI}", "2 times"), ("red " * 80 + MIMI, "too long"), ("a creature", "too long")])
def test_a_caption_needs_the_word_once_and_within_reach(host, prompt, says):
    with pytest.raises(ValueError, match=says):
        host.encode([prompt], MIMI, host.embedding(CREATURE))


@pytest.mark.parametrize("superclass", ["axolotl", "red creature", " "])
def test_the_superclass_is_one_word_that_the_encoder_knows(pipe, folder, superclass):
    with pytest.raises(ValueError, match="superclass"):
        DiffusersHost(pipe, superclass, folder)


def test_the_errors_are_those_of_the_schedule_of_diffusers(pipe, host):
    generator = torch.Generator().manual_seed(3)
    steps = torch.tensor([1, 250, 777])
    latents, noise = (torch.randn(3, mini_models.CHANNELS, 8, 8, generator=generator) for _ in range(2))
    context, _ = encode_prompts(pipe, ["a red creature", "a house", ""])
    with torch.no_grad():
        errors = host.errors(latents, noise, steps / 999, context, "a creature")
        x = pipe.scheduler.add_noise(latents, noise, steps)
        expected = (pipe.unet(x, steps, context).sample - pipe.scheduler.get_velocity(latents, noise, steps)) ** 2
    torch.testing.assert_close(errors, expected, atol=1e-4, rtol=1e-4)


def test_latents_are_the_mode_of_the_autoencoder_times_its_scale(pipe, folder, monkeypatch):
    kl = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4, scaling_factor=0.3).eval()
    for vae in pipe.vae, kl:
        monkeypatch.setattr(pipe, "vae", vae)
        latents = DiffusersHost(pipe, CREATURE, folder).latents(PICTURE)
        with torch.no_grad():
            found = vae.encode(PICTURE.movedim(-1, 1) * 2 - 1)
        expected = found.latent_dist.mean * 0.3 if vae is kl else found.latents * 0.7
        torch.testing.assert_close(latents, expected)


def test_strength_0_is_the_superclass_word_bit_for_bit(pipe, mimi, rex):
    plain = pictures(pipe, ["a red creature"], **SMALL)
    assert torch.equal(pictures(pipe, [f"a red {MIMI}"], [mimi.at(0)], **SMALL), plain)
    one = pictures(pipe, [f"a creature and a {REX}"], [rex], **SMALL)
    assert torch.equal(pictures(pipe, [f"a {MIMI} and a {REX}"], [mimi.at(0), rex], **SMALL), one)


def test_prompts_without_the_word_give_the_picture_that_they_gave(pipe, mimi, rex):
    prompts = ["a red creature", "a house"]
    plain, edited = (pictures(pipe, prompts, concepts, "blue", **SMALL) for concepts in ([], [mimi, rex]))
    assert torch.equal(plain, edited)
    beside = pictures(pipe, [f"a red {MIMI}", "a house"], [mimi, rex], "blue", **SMALL)
    assert torch.equal(beside[1], plain[1]) and not torch.equal(beside[0], plain[0])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_picture_is_of_the_prompt_the_seed_and_the_gate(pipe, mimi, guidance):
    before = state(pipe)
    made = pictures(pipe, [f"a {MIMI}", f"a {MIMI}", "a house"], [mimi.at(1)], seeds=[5, 6, 5], guidance=guidance,
                    **SMALL)
    assert same(before, state(pipe))
    assert made.shape == (3, 64, 64, 3) and 0 <= made.min() < made.max() <= 1
    alone = pictures(pipe, [f"a {MIMI}"], [mimi.at(1)], seeds=[6], guidance=guidance, **SMALL)
    torch.testing.assert_close(alone[0], made[1], atol=1e-4, rtol=1e-4)
    weaker = pictures(pipe, [f"a {MIMI}"], [mimi.raw(1.0, 0.1)], seeds=[6], guidance=guidance, **SMALL)
    assert not torch.allclose(weaker[0], made[1], atol=1e-4)


@torch.no_grad()
def test_the_prompt_is_edited_and_guided_away_from_the_plain_negative(pipe, mimi):
    made = pictures(pipe, [f"a {MIMI}"], [mimi.at(1)], "blue", guidance=4.0, seeds=[3], **SMALL)
    (context, at), (plain, _) = (encode_prompts(pipe, [text], [mimi.at(1)]) for text in (f"a {MIMI}", "blue"))
    present = at.amax(1)
    x = torch.randn(1, mini_models.CHANNELS, 8, 8, generator=torch.Generator().manual_seed(3))
    pipe.scheduler.set_timesteps(2)
    for t in pipe.scheduler.timesteps:
        with edited(hd.projections(pipe.unet), JointEdit((mimi.at(1),))(present)):
            towards = pipe.unet(x, t, context).sample
        away = pipe.unet(x, t, plain).sample
        x = pipe.scheduler.step(away + 4.0 * (towards - away), t, x).prev_sample
    by_hand = pipe.vae.decode(x / 0.7).sample.movedim(1, -1) / 2 + 0.5
    torch.testing.assert_close(made, by_hand.clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_the_order_of_concepts_does_not_matter(pipe, mimi, rex):
    prompt = [f"a {MIMI} and a {REX}"]
    one, other = (pictures(pipe, prompt, concepts, f"a {REX}", **SMALL) for concepts in ([mimi, rex], [rex, mimi]))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_concepts_that_fit_neither_the_pipeline_nor_each_other_are_refused(pipe, mimi, rex):
    fewer = dict(list(mimi.target_output.items())[1:])
    for concepts, says in (
        ([mimi.replace(base="sdxl")], "made for SDXL"), ([mimi.replace(target_output=fewer)], "other layers"),
        ([mimi, rex.replace(covariance="c" * 32)], "caption statistics"), ([mimi, rex.replace(word=MIMI)], "Two of"),
        ([mimi.replace(word=f"<m{k}>", target_input=mimi.target_input + k) for k in range(9)], "At most 8"),
    ):
        with pytest.raises(ValueError, match=says):
            pictures(pipe, ["a house"], concepts, **SMALL)


@pytest.mark.parametrize("config, count, places", [
    (SD | {"cross_attention_dim": 768}, 32, ([1, 2, 4, 5, 7, 8], range(3, 12))),
    (SD | {"cross_attention_dim": 1024, "use_linear_projection": True}, 32, ([1, 2, 4, 5, 7, 8], range(3, 12))),
    (SDXL, 140, ([4, 5, 7, 8], range(6))),
], ids=["sd1", "sd2", "sdxl"])
def test_projections_of_the_real_shapes_have_the_names_that_comfyui_gives_them(config, count, places):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = list(hd.projections(unet))
    blocks = {name.split(".transformer_blocks.")[0] for name in names}
    assert len(names) == count and all(name.endswith((".attn2.to_k", ".attn2.to_v")) for name in names)
    assert blocks == {f"input_blocks.{k}.1" for k in places[0]} | {"middle_block.1"} | {
        f"output_blocks.{k}.1" for k in places[1]}


def test_a_pipeline_of_another_family_is_refused(pipe, folder, monkeypatch):
    monkeypatch.setattr(pipe, "unet", UNet2DConditionModel(**{**mini_models.UNET, "cross_attention_dim": 96}))
    with pytest.raises(ValueError, match="SD1.5, SD2.x and SDXL.*width 96"):
        DiffusersHost(pipe, CREATURE, folder)
