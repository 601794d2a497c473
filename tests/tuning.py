"""Tiny hosts, a picture and lessons over them: what the tests of Quick Tune start from."""

import math
from contextlib import contextmanager
from dataclasses import replace

import comfy.lora
import comfy.model_management as memory
import comfy.model_sampling
import comfy.sd
import pytest
import torch

from perfusion.core import host_comfy, tune
from perfusion.core.covariance import PACKAGED
from perfusion.core.fingerprint import exact
from perfusion.core.key_lock import edited
from perfusion.core.tune import Lesson, Tuning

KINDS = "sd1", "sd2-v", "sdxl"
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


def v_prediction(model, kind="V_PREDICTION"):
    """As the stock node ModelSamplingDiscrete does it."""
    kinds = comfy.model_sampling.ModelSamplingDiscrete, getattr(comfy.model_sampling, kind)
    model = model.clone()
    model.add_object_patch("model_sampling", type("ModelSamplingAdvanced", kinds, {})(model.model.model_config))
    return model


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
