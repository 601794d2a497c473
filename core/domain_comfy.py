"""Domains in ComfyUI: a batch of pictures becomes one, and with one a picture becomes a concept at once."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import encode as encoding
from . import tune as tuning
from .apply import plain
from .concept import Concept, check_word
from .domain import Domain
from .encoder import Encoder
from .host_comfy import ComfyHost, any_tune, tower_of
from .school import Diverged, Schooled, Schooling, train
from .tower import tokens_of
from .train_domain import Course

GREY = 0.5  # of what a mask leaves out
# The node offers no learning rate, and fewer steps begin at the same one.
WAY_OUT = ("Queue again with a larger batch or another seed. A model that runs in fp16 is safer in bf16 or fp32: start "
           "ComfyUI with --bf16-unet or --fp32-unet. `python -m headless train-domain` can set a lower learning rate. "
           "If it stops at the first step, the model or the VAE gives NaN by itself: load another.")


def encode_concept(domain: Domain, model, clip, vae, clip_vision, images: Tensor, superclass: str, word: str,
                   mask: Tensor | None, folder, captions: Callable[[int, int], None]) -> Concept:
    """The concept of images (m, H, W, 3) in 0..1 with masks (m or 1, H, W), with no training: see `encode.encode`.

    What lies outside a mask is grey. Raises ValueError for bad input and where domain, model and tower do not fit.
    """
    model, resolution = plain(model), domain.training.get("resolution", 512)
    tuning.check(images, mask, tuning.Tuning())
    check_word(word)
    host, tower = ComfyHost(model, clip, vae, superclass, folder, captions), tower_of(clip_vision)
    encoding.check(domain, host.base, host.prediction, tower.hash, superclass)
    if mask is not None:
        weight = mask[..., None].expand(len(images), -1, -1, -1)
        images = images * weight + GREY * (1 - weight)
    seen, latents = tokens_of(tower, images, domain.encoder.read), host.latents(tuning.fit(images, resolution))
    with host.training(latents[:1]):
        return encoding.encode(host, domain, seen.clone(), latents.clone().to(host.device), superclass.strip(), word)


def train_domain(model, clip, vae, clip_vision, images: Tensor, superclass: str, settings: Schooling, resolution: int,
                 folder, captions, report: Callable[[Schooled], None], keep: Callable[[Domain], None]) -> Domain:
    """The domain of images (m, H, W, 3) in 0..1. Whatever ends the loop early, what was learnt by then goes to `keep`.

    Raises ValueError for bad input, and the host's cancel.
    """
    model, superclass = plain(model), superclass.strip()
    tuning.check(images, None, tuning.Tuning())
    host, tower = ComfyHost(model, clip, vae, superclass, folder, captions), tower_of(clip_vision)
    seen, latents = tokens_of(tower, images, Encoder.read), host.latents(tuning.fit(images, resolution))
    done = 0

    def data(rows, turns):
        lines = [tuning.TEMPLATES[turn % len(tuning.TEMPLATES)] for turn in turns]
        return latents[rows], torch.ones_like(latents[rows][:, :1]), seen[rows], lines

    def heard(schooled):
        nonlocal done
        done = schooled.step
        report(schooled)

    def domain():
        return course.domain(tower.hash, {
            "steps": done, "pictures": len(images), "batch": settings.batch, "seed": settings.seed,
            "learning_rate": settings.learning_rate, "resolution": resolution})

    # a step on one picture takes what a tune's takes; the encoder's own part is small beside it
    with host.training(latents[:1], rehearsal=any_tune(host, latents[:1])):
        seen, latents = seen.clone(), latents.clone()
        course = Course(host, superclass, seen, settings.seed)
        try:
            # one picture at a time, which is what the host made room for
            train(course, data, len(images), replace(settings, accumulate=settings.batch), report=heard)
        except BaseException as error:
            if done:
                keep(domain())
            if isinstance(error, Diverged):
                kept = "What was learnt before is saved." if done else "Nothing was learnt yet."
                error.args = (f"{error} {kept} {WAY_OUT}",)
            raise
        return domain()
