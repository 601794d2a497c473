"""Quick Tune from a file, cancelled, diverged or refused: what is kept, and that the model is as it was."""

import math
from dataclasses import replace

import comfy.model_management as memory
import comfy.ops
import pytest
import torch

from perfusion.core import concept, host_comfy, tune
from perfusion.core.quick_tune import quick_tune
from perfusion.core.tune import Diverged, Tuning, check, schedule, what_is_wrong

import tuning
from tuning import (
    CAT,
    FAST,
    KINDS,
    MIMI,
    PICTURE,
    SAMPLE,
    Snapshot,
    assert_close,
    forwards_left,
    host_over,
    learn,
    lesson_over,
    patched,
)

pytestmark = pytest.mark.host

folder, host, prompt = tuning.folder, tuning.host, tuning.prompt  # fixtures

EVERY_OP = hasattr(comfy.ops, "run_every_op")  # does the host look for a cancel within a step?


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


def test_from_a_concept_a_step_moves_nothing_by_more_than_a_share_of_its_size(host):
    host = host()
    start = learn(host)
    settings = replace(FAST, steps=1, trust=0.1, embedding_trust=0.02)
    further = learn(host, settings, start=start)
    moved = [(further.target_output[name] - o, o, 0.1) for name, o in start.target_output.items()]
    moved += [(further.embedding[name] - v, v, 0.02) for name, v in start.embedding.items()]
    for change, of, trust in moved:
        assert change.abs().max().item() == pytest.approx(trust * of.square().mean().sqrt().item(), rel=1e-2)


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


def test_a_small_batch_is_not_taken_for_divergence():
    """Losses that rise 14-fold from high to low noise, as a denoiser's of photographs do, in the order they are met."""
    settings = replace(FAST, steps=100, batch=1)
    for seed in range(40):
        rows = schedule(settings, 1, torch.Generator().manual_seed(seed))
        losses = [0.01 + 0.13 * (1 - t) ** 6 for ((_, _, t),) in rows]
        assert not any(what_is_wrong(losses[: k + 1], 24) for k in range(len(losses)))


# Bad input


@pytest.mark.parametrize("changes, says", (
    ({"images": None}, "picture of the thing is needed"),
    ({"images": PICTURE[:0]}, "picture of the thing is needed"),
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


def test_a_caption_that_holds_the_word_itself_gets_a_sentence(host):
    with pytest.raises(ValueError, match="2 times, and once is needed"):
        learn(host(), replace(FAST, templates=("<mimi> and a {}",)))


def test_captions_may_hold_braces_of_their_own(host):
    learnt = learn(host(), replace(FAST, templates=("a {red|blue} {}", "{} {0}")))
    assert learnt.training["steps"] == FAST.steps


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
    with pytest.raises(ValueError, match="picture of the thing is needed"):
        check(none, None, FAST)


def test_check_accepts_one_mask_for_all_and_one_each():
    images = torch.rand(3, 64, 64, 3)
    for masks in (None, torch.ones(1, 64, 64), torch.ones(3, 64, 64)):
        check(images, masks, Tuning())
