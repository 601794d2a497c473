"""What a tune takes of memory, told before its first step, against PyTorch's own account of real steps."""

import logging
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import comfy.model_management as management
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from perfusion.bench.memory import allocated
from perfusion.core import host_comfy, memory, tune
from perfusion.core.host_comfy import any_tune

import tuning
from tuning import CAT, FAST, MIMI, PICTURE, Snapshot, forwards_left, learn

pytestmark = pytest.mark.host

folder, host, prompt = tuning.folder, tuning.host, tuning.prompt  # fixtures
LATENTS = torch.zeros(1, 4, 24, 16)
MB = 2**20

each_kind = pytest.mark.parametrize("kind", tuning.KINDS)
each_way = pytest.mark.parametrize("tight", (False, True), ids=("plain", "tight"))


def within_the_promise(said, found):
    return abs(said / found - 1) <= memory.MARGIN - 1


@each_way
@each_kind
def test_what_a_step_takes_is_what_the_allocator_counts(host, kind, tight):
    host = host(kind)
    work = any_tune(host, LATENTS)
    host.learn_on(host.source, host.clip.patcher)
    said = host.needed(work, tight)
    with host.training(LATENTS, tight):
        found = allocated(work)
    assert within_the_promise(said, found), f"{said / MB:.2f} MB told, {found / MB:.2f} MB taken"


@each_kind
def test_it_is_known_before_anything_is_loaded_and_is_the_same_then(host, kind):
    host = host(kind)
    host.learn_on(host.source, host.clip.patcher)
    before = host.needed(any_tune(host, LATENTS), False)
    with host.training(LATENTS):
        assert host.needed(any_tune(host, LATENTS), False) == before


def test_it_holds_all_that_the_way_back_keeps(host):
    host, kept = host(), {}

    def keep(tensor):
        if id(tensor) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with host.training(LATENTS):
        weights = {id(w) for m in (host.patcher.model, host.text) for w in m.parameters()}
        said = host.needed(any_tune(host, LATENTS), False)
        context = host.plain("a cat")[0].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            host.errors(LATENTS, LATENTS, torch.tensor([0.5]), context, "a cat")
    assert 0.4 * said < sum(kept.values()) < said


def test_more_pixels_and_more_captions_take_more_and_computing_twice_takes_less(host):
    host = host()

    def needed(latents, tight=False, batch=4):
        vectors, (inverse, _, _) = host.embedding(CAT), host.inverse_covariance()
        settings = replace(FAST, batch=batch, templates=tune.TEMPLATES)
        return host.needed(partial(tune.rehearse, host, CAT, MIMI, vectors, inverse, settings, None, latents), tight)

    host.learn_on(host.source, host.clip.patcher)
    assert needed(LATENTS, tight=True) < needed(LATENTS) < needed(LATENTS.repeat(1, 1, 2, 2))
    # a batch encodes each caption once, however large it is
    assert needed(LATENTS, batch=1) < needed(LATENTS, batch=len(tune.TEMPLATES)) == needed(LATENTS, batch=64)


def test_it_follows_the_kernel_of_attention_that_is_chosen(host):
    host = host()
    work = any_tune(host, LATENTS.repeat(1, 1, 2, 2))
    with host.training(LATENTS):
        fused = host.needed(work, False)
        with sdpa_kernel(SDPBackend.MATH):
            said, found = host.needed(work, False), allocated(work)
    assert within_the_promise(said, found) and said > 1.5 * fused


def test_weights_that_are_cast_to_another_type_are_kept_twice_and_counted(host):
    full, half = host("sdxl"), host("sdxl")
    half.source.set_model_compute_dtype(torch.bfloat16)
    half = host_comfy.ComfyHost(half.source, half.clip, half.vae, CAT, half.folder)
    work = any_tune(half, LATENTS)
    with half.training(LATENTS):
        said, found = half.needed(work, False), allocated(work)
    full.learn_on(full.source, full.clip.patcher)
    assert within_the_promise(said, found) and said > full.needed(any_tune(full, LATENTS), False)


def test_telling_changes_nothing_and_what_is_learnt_is_the_same(host):
    host = host()
    before, expected = Snapshot(host), learn(host)
    host.learn_on(host.source, host.clip.patcher)
    for tight in (False, True):
        host.needed(any_tune(host, LATENTS), tight)
    weights = [w for m in (host.source.model, host.text) for w in m.state_dict().values()]
    assert not forwards_left(host) and not any(isinstance(w, FakeTensor) for w in weights)
    found = learn(host)
    assert all(torch.equal(found.target_output[name], o) for name, o in expected.target_output.items())
    before.assert_same(host)


@pytest.mark.parametrize("free, said, tight", (
    (2**40, "MB of memory, and there are 1024.0 GB.", False),
    (6 * MB, "MB of memory, with blocks computed twice, and there are", True),
    (1 * MB, "MB of memory even with blocks computed twice, and there are .*: it is tried, and may run out", True),
))
def test_it_is_told_before_the_first_step_and_less_is_kept_where_it_would_not_fit(host, monkeypatch, free, said, tight):
    heard = []
    host = host(note=heard.append)
    monkeypatch.setattr(management, "get_free_memory", lambda device=None, torch_free_too=False: free)
    learnt = learn(host, replace(FAST, resolution=128), report=lambda progress: heard.append(progress.step))
    assert heard[1:] == [1, 2, 3] and host.tight == tight and learnt.training["steps"] == 3
    assert heard[0].startswith("Needs about ") and re.search(said, heard[0]), heard[0]


FORKED = """
import os, torch
from core.memory import rehearsed
layer = torch.nn.Linear(4, 4)
def work(): layer(torch.ones(2, 4, requires_grad=True)).sum().backward()
rehearsed(work, [layer], torch.device("cpu"))
if not os.fork():
    work()
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_fork_of_a_process_whose_first_way_back_was_a_rehearsal_can_learn():
    pack = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", FORKED], cwd=pack, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_model_that_wants_to_see_numbers_is_learnt_on_all_the_same(host, caplog):
    host = host()

    def look(module, inputs):
        if isinstance(inputs[0], FakeTensor):
            raise RuntimeError("no numbers here")

    handle = host.source.model.diffusion_model.register_forward_pre_hook(look)
    with caplog.at_level(logging.WARNING):
        assert learn(host).training["steps"] == FAST.steps
    handle.remove()
    assert "could not be told. no numbers here" in caplog.text


def test_the_other_host_is_told_by_the_same_account(miniature, tmp_path):
    from perfusion.bench import world
    from perfusion.core import host_diffusers

    with torch.inference_mode(False):
        place = miniature(tmp_path, world.sample(40, torch.Generator().manual_seed(1))["captions"])
        host = host_diffusers.DiffusersHost(host_diffusers.load(place), "creature", place)
        vectors, (inverse, _, _) = host.embedding("creature"), host.inverse_covariance()
        latents = host.latents(PICTURE.clone())
        work = partial(tune.rehearse, host, "creature", MIMI, vectors, inverse, FAST, None, latents)
        with host.training(latents):
            models = host.pipe.unet, *(model for _, model in host.encoders.values())
            said, found = memory.rehearsed(work, models, host.device), allocated(work)
    assert within_the_promise(said, found)
