"""Quick Tune repeated, in batches and in less memory, and what becomes of its pictures and masks."""

import math
from dataclasses import replace

import pytest
import torch

from perfusion.core import concept, host_comfy
from perfusion.core.tune import Tuning, fit, schedule

import tuning
from tuning import (
    FAST,
    KINDS,
    PICTURE,
    SAMPLE,
    STILL,
    assert_close,
    forwards_left,
    host_over,
    learn,
    leaves,
    lesson_over,
    loss_by_hand,
    patched,
    step,
)

pytestmark = pytest.mark.host

folder, host, prompt = tuning.folder, tuning.host, tuning.prompt  # fixtures


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
