"""An album is what a domain learns from: a folder of pictures (here), or shards of them (shards.py).

It has a length, and for each row a name, a picture and what is written beside it; hashes of what it holds and of the
files as they are; and a sample of rows, with those that are held out at its end. Here too is what the VAE and the tower
see of a row.
"""

import re
from collections.abc import Sequence
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


def enough(count: int, where, what: str):
    """Raise ValueError where an album holds too few pictures."""
    if count < 2 * HELD:
        raise ValueError(f"'{where}' holds {count} pictures ({what}); a domain needs at least {2 * HELD}, and "
                         "thousands to be of use.")


class Folder:
    """The pictures of a folder and of those in it. Raises ValueError where they are too few."""

    def __init__(self, folder: Path):
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in KINDS)
        enough(len(self.paths), folder, ", ".join(KINDS))
        listing = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in self.paths]
        self.hash = fingerprint(listing)  # by name and size: a folder that was copied has other times
        self.state = fingerprint(listing, [path.stat().st_mtime_ns for path in self.paths])

    def __len__(self):
        return len(self.paths)

    def name(self, row: int) -> str:
        return str(self.paths[row])

    def picture(self, row: int) -> torch.Tensor:
        return pictures.read(self.paths[row])

    def beside(self, row: int) -> bytes | None:
        text = self.paths[row].with_suffix(".txt")
        return text.read_bytes() if text.exists() else None

    def sample(self, seed: int) -> list[int]:
        """The rows of which is kept what VAE and tower see: all."""
        return list(range(len(self)))


def captions_of(album, row: int, host) -> list[str]:
    """The captions beside a picture, each with {} once, or the templates that concepts are learnt with.

    They are tokenised here, and not only where they are learnt from, so that one too long stops no training midway.
    """
    text, superclass, beside = album.beside(row), host.superclass, f"'{Path(album.name(row)).with_suffix('.txt')}'"
    if text is None:
        return list(tuning.TEMPLATES)
    try:
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"The text of {beside} is not written in UTF-8 ({error}).") from error
    named = [line if "{}" in line else re.sub(rf"\b{re.escape(superclass)}\b", "{}", line, count=1) for line in lines]
    bad = [line for line in named if line.count("{}") != 1]
    if bad or not lines:
        raise ValueError(f"Each caption in {beside} has to hold {{}} or the word {superclass} once, where the thing "
                         f"goes; got '{bad[0] if bad else 'no caption'}'.")
    try:
        host.places([line.replace("{}", WORD) for line in named], WORD)
    except ValueError as error:
        raise ValueError(f"In {beside}, with {WORD} where the thing goes: {error}") from error
    return named


def look(images: torch.Tensor, host, tower: Tower):
    """(latents (m, c, h, w), class tokens (m, l, w)) in fp16 of square pictures (m, H, W, 3)."""
    some = max(1, PIXELS // images.shape[1] ** 2)
    return (torch.cat([host.latents(few).half().cpu() for few in images.split(some)]),
            tokens_of(tower, images, Encoder.read).half())


def seen(album, rows: Sequence[int], work: Path, host, tower: Tower, resolution: int, say=print):
    """`look` at these rows of an album, from `work` if that is there."""
    vae = host.pipe.vae
    key = fingerprint(tower.hash, vae.state_dict(), vae.config.scaling_factor, resolution, album.state, list(rows))
    kept = work / f"seen-{key[:16]}.safetensors"
    if not kept.exists():
        latents, tokens = [], []
        with ThreadPoolExecutor(READERS) as readers:
            for begin in range(0, len(rows), AT_ONCE):
                part = rows[begin : begin + AT_ONCE]
                images = torch.cat(list(readers.map(lambda row: square(album.picture(row), resolution), part)))
                for found, few in zip((latents, tokens), look(images, host, tower)):
                    found.append(few)
                done = begin + len(part)
                say(f"\rpictures read, once: {done} of {len(rows)}", end="\n" * (done == len(rows)), flush=True)
        write(kept, pack({"latents": torch.cat(latents), "tokens": torch.cat(tokens)}, {}))
    stored = safetensors.torch.load_file(kept)
    return stored["latents"], stored["tokens"]


def square(picture: torch.Tensor, side: int) -> torch.Tensor:
    """The middle square (1, side, side, 3) of a picture (1, H, W, 3)."""
    return middle(picture, side).movedim(1, -1)  # BCHW -> BHWC
