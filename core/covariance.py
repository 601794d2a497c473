"""The covariance of a text encoder, computed once from captions and kept on disk.

C is the uncentred second moment of token encodings, from the start token to the first end token of each caption
(padding would be three quarters of the mass). Which tokens enter matters, how many hardly: five thousand of SD1.5's
give similarities to within .006 (simulated from the covariance that perfusion-pytorch ships). The packaged list has
4096 captions and is drawn by `bench/captions.py`; a user's own `captions.txt` in the folder takes its place.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .file import write
from .fingerprint import fingerprint
from .key_lock import invert, second_moment

PACKAGED = Path(__file__).parent / "captions.txt"
ENOUGH = 10  # tokens per dimension, below which C is blended with a multiple of the identity
RIDGE = 0.01
BATCH = 32
FRAMES, SHORT = 64, 200  # captions; characters, which are fewer than 77 tokens
PLAIN = "cat", "dog", "bird", "horse", "man", "woman", "child", "house", "car", "tree", "flower", "chair"
BRACKETS = re.compile(r"[()\[\]{}<>|\\]")


def captions(folder: Path) -> list[str]:
    """The user's own captions if the folder holds `captions.txt`, else the packaged ones; one a line."""
    own = Path(folder) / "captions.txt"
    path = own if own.exists() else PACKAGED
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"The caption file {path} is empty. Put one caption on each line, some thousands of them, or "
                         "delete the file to use the packaged list.")
    return lines


def frames(lines: list[str], superclass: str) -> list[str]:
    """Captions with {} where the thing is: those that name the superclass once, then those that name another plain
    thing once. Short ones without brackets, which a prompt could mean something by; FRAMES of them, or fewer."""
    named, others = [], []
    for line in lines:
        for word in (superclass, *PLAIN):
            frame, times = re.subn(rf"\b{re.escape(word)}\b", "{}", line, flags=re.IGNORECASE)
            if times == 1 and len(line) <= SHORT and not BRACKETS.search(line):
                (named if word == superclass else others).append(frame)
                break
    return (named + others)[:FRAMES]


def name_of(encoder: str, lines: list[str]) -> str:
    """The covariance's hash, by which concepts and files name it, of a text encoder (its hash) and captions."""
    return fingerprint(encoder, lines)[:32]


def inverse_of(
    encode: Callable[[list[str]], list[Tensor]],
    encoder: str,
    lines: list[str],
    folder: Path,
    progress: Callable[[int, int], None],
) -> tuple[Tensor, str, dict]:
    """C⁻¹ (d, d) in fp64, the covariance's hash, and facts for the concept's record.

    `encode` gives the encodings (n, d) of each of a few captions, start to first end token; `encoder` is the hash of
    the text encoder that it uses, which with the captions names the file. `progress` hears (done, total) captions.
    """
    key = name_of(encoder, lines)
    path = Path(folder) / "covariance" / f"{key}.safetensors"
    try:
        stored = safetensors.torch.load_file(path)
        C, tokens = stored["covariance"], int(stored["tokens"])
    except (FileNotFoundError, SafetensorError):  # damaged is as good as absent
        def encodings():
            for i in range(0, len(lines), BATCH):
                progress(i, len(lines))
                yield from encode(lines[i : i + BATCH])
            progress(len(lines), len(lines))

        C, tokens = second_moment(encodings())
        C = C.float().cpu()
        try:
            write(path, safetensors.torch.save({"covariance": C, "tokens": torch.tensor(tokens)}))
        except OSError as error:  # a folder that is read-only, or full
            logging.warning(f"Perfusion: the captions' covariance is computed anew each time. {error.strerror}")
    ridge = 0.0 if tokens >= ENOUGH * len(C) else RIDGE
    if ridge:
        logging.warning(f"Perfusion: {len(lines)} captions ({tokens} tokens) are few for a text width of {len(C)}; "
                        f"a ridge of {ridge} of the mean eigenvalue is added. Some thousands of captions need none.")
    return invert(C, ridge), key, {"captions": len(lines), "tokens": tokens, "ridge": ridge}
