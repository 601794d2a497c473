"""Memory that runs out while a concept is learnt, in the midst of a real model: once more in less, or a sentence."""

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from perfusion.core import host_comfy
from perfusion.core.once_more import FACT, once_more
from perfusion.core.quick_tune import quick_tune

import test_quick_tune
import tuning
from tuning import CAT, FAST, MIMI, PICTURE, Snapshot, learn

pytestmark = pytest.mark.host

folder, host, prompt = tuning.folder, tuning.host, tuning.prompt  # fixtures
SETTINGS = replace(FAST, resolution=128)


@contextmanager
def running_out(module, *calls):
    """While open, memory runs out as a module is called for so-and-so many times; gives how often it was called. What
    has no content takes no memory, and does not count."""
    called = [0]

    def hook(module, inputs):
        called[0] += not isinstance(inputs[0], FakeTensor)
        if called[0] in calls:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = module.register_forward_pre_hook(hook)
    try:
        yield called
    finally:
        handle.remove()


def places(host):
    """Where it may run out: in the UNet's middle, at its way up, in the text encoder."""
    unet = host.source.model.diffusion_model
    return [unet.middle_block[1].transformer_blocks[0].attn2.to_v, unet.out[0],
            host.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[1].mlp]


def asked(host, kept, notes, settings=SETTINGS):
    def again(settings, tight):
        return learn(host, settings, keep=lambda found: kept.append(found) or "a file", tight=tight)

    return once_more(host, again, settings, notes.append)


@pytest.mark.parametrize("seed", range(3))
def test_memory_that_runs_out_once_is_told_and_the_same_is_learnt_with_less(host, seed):
    host, kept, notes, r = host(), [], [], random.Random(seed)
    expected, module = learn(host, SETTINGS), places(host)[seed]
    before = Snapshot(host)
    with running_out(module) as called:
        learn(host, SETTINGS)
    with running_out(module, r.randrange(1, called[0] + 1)):
        found = asked(host, kept, notes)
    assert not kept and host.tight
    assert notes == ["Memory ran out. Once more from the beginning, learnt with less memory and more time."]
    assert found.training == expected.training | {FACT: "learnt with less memory and more time"}
    for name, o in expected.target_output.items():
        torch.testing.assert_close(found.target_output[name], o)
    before.assert_same(host)


def test_where_memory_was_short_already_the_resolution_is_lowered(host, monkeypatch):
    monkeypatch.setattr(host_comfy, "MARGIN", 10**9)
    host, notes = host(), []
    with running_out(places(host)[0], 2):
        found = asked(host, [], notes)
    assert found.training["resolution"] == 64 and found.training[FACT] == "learnt at 64 pixels"
    assert "learnt at 64 pixels" in notes[0]


def test_memory_that_runs_out_twice_gets_a_sentence_and_keeps_what_was_learnt(host):
    host, kept, notes = host(), [], []
    before, module = Snapshot(host), places(host)[1]
    with running_out(module) as called:
        learn(host, SETTINGS)
    last = called[0]
    with pytest.raises(torch.cuda.OutOfMemoryError, match="ran out twice.*Lower the resolution from 128.*larger one"):
        with running_out(module, 3, 3 + last):
            asked(host, kept, notes)
    assert len(notes) == 1 and [found.training["steps"] for found in kept] == [2]
    before.assert_same(host)


def test_the_other_host_learns_the_same_with_less_and_is_left_as_it_was(miniature, tmp_path):
    from perfusion.bench import world
    from perfusion.core import host_diffusers, tune

    with torch.inference_mode(False):
        folder = miniature(tmp_path, world.sample(40, torch.Generator().manual_seed(1))["captions"])
        host = host_diffusers.DiffusersHost(host_diffusers.load(folder), "creature", folder)
        whole, less = (tune.tune(host, PICTURE.clone(), "creature", MIMI, SETTINGS, tight=tight)
                       for tight in (False, True))
    assert host.tight and not host.pipe.unet.is_gradient_checkpointing
    for name, o in whole.target_output.items():
        torch.testing.assert_close(less.target_output[name], o)


def test_quick_tune_says_so_and_does_not_take_it_for_what_was_asked(tiny, tmp_path):
    watch = test_quick_tune.Watch()
    (tmp_path / "captions.txt").write_text("\n".join(f"a photo of a {w} on a {x}" for w in "cat dog red big old".split()
                                                     for x in "chair table hill road".split()), encoding="utf-8")
    model, clip, vae = tiny("sd1")

    def fail_in_training(module, inputs):
        if torch.is_grad_enabled() and not isinstance(inputs[0], FakeTensor) and len(watch.notes) < 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    handle = model.model.diffusion_model.register_forward_pre_hook(fail_in_training)
    concept, _, after = quick_tune(model, clip, vae, PICTURE, CAT, MIMI, FAST, None, None, tmp_path, watch, None)
    handle.remove()
    assert "Needs about" in watch.notes[0] and "Memory ran out" in watch.notes[1]
    assert FACT in concept.training and after.isfinite().all()
    assert not (tmp_path / "cache").exists()
