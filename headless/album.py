"""A folder of pictures, as a domain learns from it: their captions, and what the VAE and the tower see of them."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch

from core import tune as tuning
from core.encoder import Encoder
from core.file import pack, write
from core.fingerprint import fingerprint
from core.tower import Tower, middle, tokens_of
from core.train_domain import WORD

from . import pictures

KINDS = ".png", ".jpg", ".jpeg", ".webp"
HELD = 4  # pictures that are not trained on
AT_ONCE = 64  # pictures in memory, which are read side by side
READERS = 8  # of which as many are whole at a time, before they are scaled
PIXELS = 2**21  # that the VAE sees at once: eight pictures of 512 pixels squared


def listed(folder: Path) -> list[Path]:
    """The pictures of a folder and of those in it. Raises ValueError where they are too few."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in KINDS)
    if len(paths) < 2 * HELD:
        raise ValueError(f"'{folder}' holds {len(paths)} pictures ({', '.join(KINDS)}); a domain needs at least "
                         f"{2 * HELD}, and thousands to be of use.")
    return paths


def captions_of(path: Path, host) -> list[str]:
    """The captions beside a picture, each with {} once, or the templates that concepts are learnt with.

    They are tokenised here, and not only where they are learnt from, so that one too long stops no training midway.
    """
    beside, superclass = path.with_suffix(".txt"), host.superclass
    if not beside.exists():
        return list(tuning.TEMPLATES)
    lines = [line.strip() for line in beside.read_text(encoding="utf-8").splitlines() if line.strip()]
    named = [line if "{}" in line else re.sub(rf"\b{re.escape(superclass)}\b", "{}", line, count=1) for line in lines]
    bad = [line for line in named if line.count("{}") != 1]
    if bad or not lines:
        raise ValueError(f"Each caption in '{beside}' has to hold {{}} or the word {superclass} once, where the thing "
                         f"goes; got '{bad[0] if bad else 'no caption'}'.")
    try:
        host.places([line.replace("{}", WORD) for line in named], WORD)
    except ValueError as error:
        raise ValueError(f"In '{beside}', with {WORD} where the thing goes: {error}") from error
    return named


def seen(paths: list[Path], folder: Path, work: Path, host, tower: Tower, resolution: int, say=print):
    """(latents (m, c, h, w), class tokens (m, l, w)) of the pictures of a folder, from `work` if they are there."""
    files = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    vae = host.pipe.vae
    key = fingerprint(tower.hash, vae.state_dict(), vae.config.scaling_factor, resolution, files)
    kept = work / f"seen-{key[:16]}.safetensors"
    if not kept.exists():
        latents, tokens, some = [], [], max(1, PIXELS // resolution**2)
        with ThreadPoolExecutor(READERS) as readers:
            for begin in range(0, len(paths), AT_ONCE):
                part = paths[begin : begin + AT_ONCE]
                images = torch.cat(list(readers.map(lambda path: square(pictures.read(path), resolution), part)))
                latents += [host.latents(few).half().cpu() for few in images.split(some)]
                tokens.append(tokens_of(tower, images, Encoder.read).half())
                done = begin + len(part)
                say(f"\rpictures read, once: {done} of {len(paths)}", end="\n" * (done == len(paths)), flush=True)
        write(kept, pack({"latents": torch.cat(latents), "tokens": torch.cat(tokens)}, {}))
    stored = safetensors.torch.load_file(kept)
    return stored["latents"], stored["tokens"]


def square(picture: torch.Tensor, side: int) -> torch.Tensor:
    """The middle square (1, side, side, 3) of a picture (1, H, W, 3)."""
    return middle(picture, side).movedim(1, -1)  # BCHW -> BHWC
