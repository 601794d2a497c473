"""The host's cancel, at every phase of Quick Tune, Encode Concept and Train Domain: wherever a module is at work.

Each module of the text encoder, the UNet, the VAE and the vision tower that the host runs is a place where it looks for
a cancel, so places spread over all calls of a run are places in every phase of it. v0.3.64 does not look there: between
the pack's own looks, and the sampler's, a call of a model runs to its end, and the last one of a run with it.
"""

from contextlib import contextmanager

import comfy.model_management as memory
import comfy.ops
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from perfusion.core import concept as concepts
from perfusion.core import domain_comfy
from perfusion.core.concept import dump
from perfusion.core.covariance import PACKAGED
from perfusion.core.quick_tune import quick_tune
from perfusion.core.school import Schooling
from perfusion.core.tune import Tuning

import test_domain_comfy
import test_quick_tune
import tuning

pytestmark = pytest.mark.host
prompt, towers = tuning.prompt, test_domain_comfy.towers  # fixtures
PLACES = [4, pytest.param(24, marks=pytest.mark.faults)]


@contextmanager
def cancelled(at=0):
    """While open, the host is told to cancel as the so-and-so-many-th module begins; gives how many have."""
    calls = [0]

    def hook(*_):
        calls[0] += 1
        if calls[0] == at:
            memory.interrupt_current_processing(True)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()
        memory.interrupt_current_processing(False)


@pytest.fixture
def folder(tmp_path):
    lines = PACKAGED.read_text(encoding="utf-8").splitlines()
    (tmp_path / "captions.txt").write_text("\n".join(lines[::128]), encoding="utf-8")
    return tmp_path


def stopped_everywhere(run, places, check, same):
    """Cancels `run()` at so many places of it, asks `check()` after each, and answers how often it was stopped. What
    runs to its end has to be the `same` as what nobody cancels, as has a run after all."""
    with cancelled() as calls:
        expected = run()
    total, stops = calls[0], 0
    for k in range(places):
        check(clean=True)
        with cancelled(1 + (total - 1) * k // places):
            try:
                same(run(), expected)
            except memory.InterruptProcessingException:
                stops += 1
        check()
    check(clean=True)
    same(run(), expected)
    assert stops == places or stops >= places / 2 and not hasattr(comfy.ops, "run_every_op")
    return stops


@pytest.mark.parametrize("places", PLACES)
def test_quick_tune_can_be_cancelled_anywhere_and_leaves_the_model_as_it_was(tiny, folder, places, tally):
    model, clip, vae = tiny("sd1")
    settings, kept = Tuning(steps=2, batch=1, resolution=64, templates=("a {}", "the {}")), []
    before = tuning.Snapshot(tuning.host_over(model, clip, vae, folder))

    def run():
        return quick_tune(model, clip, vae, test_quick_tune.PICTURE, "cat", "<mimi>", settings, None, None, folder,
                          test_quick_tune.Watch(), lambda found: kept.append(found) or "a file", 1)

    def check(clean=False):
        for path in folder.rglob("*.safetensors"):
            assert clean or path.parent.name in ("cache", "covariance")
            if clean:
                path.unlink()
        for path in folder.rglob("*.tmp"):
            raise AssertionError(path)
        while kept:
            concepts.parse(dump(kept.pop()), "kept")
        if not clean:
            before.assert_same(tuning.host_over(model, clip, vae, folder))

    def same(found, expected):
        assert dump(found[0]) == dump(expected[0]) and torch.equal(found[2], expected[2])

    tally("cancels", **{"of Quick Tune": stopped_everywhere(run, places, check, same)})


@pytest.mark.parametrize("places", PLACES)
def test_a_domains_training_and_an_encoding_can_be_cancelled_anywhere(tiny, towers, folder, places, tally):
    model, clip, vae = tiny("sd1")
    tower, kept = towers[0], []
    pictures = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    before = tuning.Snapshot(tuning.host_over(model, clip, vae, folder))

    def run():
        learnt = domain_comfy.train_domain(model, clip, vae, tower, pictures, "cat", Schooling(2, 2), 64, folder,
                                           lambda *heard: None, lambda schooled: None, kept.append)
        return learnt, domain_comfy.encode_concept(learnt, model, clip, vae, tower, pictures[:1], "cat", "<mimi>", None,
                                                   folder, lambda *heard: None)

    def check(clean=False):
        for path in folder.rglob("*.safetensors"):
            assert path.parent.name == "covariance"
            if clean:
                path.unlink()
        while kept:
            assert kept.pop().training["steps"] in (1, 2)
        if not clean:
            before.assert_same(tuning.host_over(model, clip, vae, folder))

    def same(found, expected):
        assert found[0].hash == expected[0].hash and dump(found[1]) == dump(expected[1])

    tally("cancels", **{"of a domain's training and an encoding": stopped_everywhere(run, places, check, same)})
