"""A concept's fidelity curve in ComfyUI: its pictures at each strength, and what a CLIP_VISION answers to them.

Any vision model that the host loads will do (CLIP, SigLIP, DINOv2): they all answer with a vector for the picture and
with tokens of their second last layer. A text encoder is not asked how well a picture fits its prompt: that takes one
that was trained together with the vision model, which SD1.5's checkpoints hold no more than half of (no projection).
"""

from collections.abc import Callable

import comfy.model_management as memory
import torch
from torch import Tensor

from . import tune as tuning
from .apply import apply, check, plain
from .concept import Concept
from .fidelity import Curve, likeness, obedience, prompts_in, rising
from .fingerprint import fingerprint, sample
from .host_comfy import picture
from .sweep import strengths_in


def measure(model, clip, vae, clip_vision, concept: Concept, images: Tensor, strengths: str, prompts: str, seed: int,
            resolution: int, drew: Callable[[Tensor, int, int], None]) -> tuple[Concept, Tensor]:
    """(the concept with its curve, its strength at the knee; pictures (s, p, H, W, 3) that it was measured on).

    `images` (m, H, W, 3) are those that it was learnt from. `drew` hears (picture, done, all). Concepts that the model
    carries already take no part. Raises ValueError for bad input, before any picture, and the host's cancel.
    """
    model, asked = plain(model), prompts_in(prompts)
    each = rising(strengths_in(strengths), len(asked))
    tuning.check(images, None, tuning.Tuning(resolution=resolution))
    if concept.blank:
        raise ValueError(f"Nothing was learnt of {concept.word}: it is the plain word at every strength, and there is "
                         "no curve to draw. Tune it first.")
    check(model, clip, concept)
    photos, _ = answers(clip_vision, images)
    size = tuple(side // 8 for side in tuning.fit(images[:1], resolution).shape[1:3])
    made = []
    for strength in each:
        here, words = apply(model, clip, concept.at(strength))
        for place, prompt in enumerate(asked):
            memory.throw_exception_if_processing_interrupted()
            made.append(picture(here, words, vae, prompt.replace("{}", concept.word), size, seed + place))
            drew(made[-1], len(made), len(each) * len(asked))
    pictures = torch.cat(made)[..., :3].clamp(0, 1)
    if not pictures.isfinite().all():
        raise ValueError("Some of the pictures are no numbers (NaN), so nothing can be measured. A model that runs in "
                         "fp16 is safer in bf16 or fp32: start ComfyUI with --bf16-unet or --fp32-unet, or load "
                         "another VAE.")
    vectors, means = (part.unflatten(0, (len(each), len(asked))) for part in answers(clip_vision, pictures))
    curve = Curve(each, rounded(likeness(vectors, photos)), rounded(obedience(means)), tower_hash(clip_vision), asked,
                  seed)
    return concept.at(curve.knee).replace(fidelity=curve), pictures.unflatten(0, (len(each), len(asked)))


def answers(clip_vision, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a vision model answers to pictures (m, H, W, 3) in 0..1, as vectors (m, w), and the means of its tokens
    before the last layer (m, w'), in fp32 on the CPU. Raises ValueError where it is none that does."""
    if not hasattr(clip_vision, "encode_image"):
        raise ValueError(f"A CLIP vision model was expected and {type(clip_vision).__name__} came. Load one with Load "
                         "CLIP Vision.")
    found = []
    for one in images.split(1):
        memory.throw_exception_if_processing_interrupted()
        out = clip_vision.encode_image(one)
        vector, tokens = (out[name].float().cpu() for name in ("image_embeds", "penultimate_hidden_states"))
        found.append((vector if vector.ndim == 2 else vector.mean(1), tokens.mean(1)))  # SigLIP: one a place
    vectors, means = map(torch.cat, zip(*found))
    if not vectors.isfinite().all() or not means.isfinite().all():
        raise ValueError("The connected CLIP vision model answers with values that are no numbers. Its file may be "
                         "damaged: load it again, or another one.")
    return vectors, means


def rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(v, 4) for v in values.tolist())


def tower_hash(clip_vision) -> str:
    """The hash of a vision model's weights, in fp16, as which some hosts load them."""
    return fingerprint({name: (tuple(w.shape), sample(w).half()) for name, w in clip_vision.get_sd().items()})
