"""A picture becomes a concept at once, with a domain and on a machine with Python alone."""

from pathlib import Path

import torch
from transformers import CLIPVisionModel

from core import concept as concepts
from core import domain as domains
from core import encode as encoding
from core import host_diffusers
from core import tune as tuning
from core.tower import Tower, of_transformers, tokens_of

from .learn import alike, captions, open_model, target


def open_tower(path) -> Tower:
    """The vision tower of a folder of transformers' CLIPVisionModel."""
    try:
        model = CLIPVisionModel.from_pretrained(str(path), local_files_only=True, torch_dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' is not a folder of a CLIP vision model (config.json and model.safetensors): "
                         f"{error}") from error
    return of_transformers(model.to("cuda" if torch.cuda.is_available() else "cpu"))


def concept_of(host, domain: domains.Domain, tower: Tower, images: torch.Tensor, word: str) -> concepts.Concept:
    """The concept of pictures (m, H, W, 3) in 0..1. Raises ValueError where domain, model and tower do not fit."""
    encoding.check(domain, host.base, host.prediction, tower.hash, host.superclass)
    seen = tokens_of(tower, images, domain.encoder.read)
    latents = host.latents(tuning.fit(images, domain.training.get("resolution", 512)))
    with host.training(latents[:1]):
        return encoding.encode(host, domain, seen, latents, host.superclass, word)


def encode(arguments):
    """Make a concept of one or several pictures of one thing at once, by what a domain knows of its kind."""
    out = target(arguments.out, arguments.word.strip("<>"))
    images, domain = alike(arguments.pictures), domains.load(arguments.domain)
    pipe, folder = open_model(arguments.model)
    host = host_diffusers.DiffusersHost(pipe, domain.superclass, folder, captions)
    learnt = concept_of(host, domain, open_tower(arguments.tower), images, arguments.word)
    path = concepts.save(learnt, Path(out))
    print(f"{path}: {path.stat().st_size / 1024:.1f} KB. {encoding.far(learnt)}".rstrip())
