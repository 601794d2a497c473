"""When and where a concept acts, what its keys are locked to, and which versions of its prompt are read meanwhile.

A version of a prompt has some of the concepts' words given back to their superclass words, and is named by these words;
the prompt as it was encoded is the version of none. A concept that does not act is off, as at strength 0: its word is
given back and nothing is edited for it. What a text encoder makes of the versions is kept beside the prompt, because
while a picture is made there is no text encoder at hand.

    V = W (x − Σⱼ cⱼ i*ⱼ) + Σⱼ gⱼ o*ⱼ    x   the version without the words of those that do not act
    K = W x′                              x′  x without the words of those whose lock is global too

Global key-locking (Perfusion, arXiv 2305.01644) aligns the keys of a whole prompt with its superclass version while
pictures are made, where the local lock of key_lock.py holds the concept's own tokens. The keys of x′ are the plain ones
(a public implementation edits them on top); for concepts of a local lock beside it x′ is edited as ever.

Letters: b batch · n tokens · d text width · j concepts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .apart import members
from .key_lock import Edit
from .region import Words, shares

AS_ENCODED = Words()


@dataclass(frozen=True, eq=False)
class Acting:
    """The part of sampling in which a concept acts, 0 its start and 1 its end, both in it; its lock; its place."""

    start: float = 0.0
    end: float = 1.0
    lock: str = "local"  # or "global"
    region: Tensor | None = None  # (1, h, w) in 0..1, everywhere if none is given; see region.py
    apart: bool = False  # from other concepts that are so, where a prompt names them too; see apart.py

    def __post_init__(self):
        if self.region is not None and len(self.region) != 1:
            raise ValueError(f"A region is one mask for all pictures, and {len(self.region)} came. Choose one of them.")

    @property
    def timed(self) -> bool:
        return self.start > 0 or self.end < 1

    def at(self, time: float) -> bool:
        """Whether the concept acts when this part of sampling is done."""
        return self.start <= time <= self.end


def places(acting: Mapping[str, Acting]) -> dict[Words, Tensor]:
    """The share (1, h, w) that each pixel has of every set of concepts, by the words of those outside of it."""
    return shares({word: a.region for word, a in acting.items() if a.region is not None})


def given_back(acting: Mapping[str, Acting], on: Words) -> tuple[Words, Words]:
    """The versions that keys and that values read while the words of `on` act."""
    away = Words(acting) - on
    return away | {word for word, a in acting.items() if a.lock == "global"}, away


def versions(acting: Mapping[str, Acting]) -> tuple[Words, ...]:
    """Every version that is read at some time and place, the prompt as it was encoded first."""
    ends = sorted({0.0, 1.0, *(time for a in acting.values() for time in (a.start, a.end))})
    times = *ends, *((a + b) / 2 for a, b in pairwise(ends))
    on = {Words(word for word, a in acting.items() if a.at(time)) for time in times}
    read = {now - away for now in on for away in places(acting)}
    for now in [*on, *read]:
        each = members(acting, now)
        read |= {now - each, *(now - (each - {word}) for word in each)} if each else set()
    found = {words for now in read for words in given_back(acting, now)}
    return AS_ENCODED, *sorted(found - {AS_ENCODED}, key=sorted)


def version(texts: Mapping[Words, Tensor], words: Words) -> Tensor:
    """Encodings (b, n, d) of a version. Raises ValueError where the prompts were encoded without it."""
    if words not in texts:
        raise ValueError(
            f"{' and '.join(sorted(words))} should be given back to the superclass word, and the prompts were encoded "
            "for another Gate Strength. Connect MODEL and CLIP from the same Apply Perfusion Concept."
        )
    return texts[words]


class VersionedEdit:
    """For `key_lock.edited`: an edit of the versions `keys` and `values` (b, n, d) of prompts that are `encoded`.

    `key_edit` is what is left of the edit for keys under a global lock. A row that another node has changed since it
    was encoded is edited as it comes: its versions are unknown.
    """

    def __init__(self, edit: Edit, key_edit: Edit, encoded: Tensor, keys: Tensor, values: Tensor):
        self.edit, self.key_edit, self.encoded, self.keys, self.values = edit, key_edit, encoded, keys, values
        self.target_output = edit.target_output

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        same = as_encoded(x, self.encoded)
        keys, values, g = self.edit(torch.where(same, self.values.to(x), x))
        return torch.where(same, self.key_edit(self.keys.to(x))[0], keys), values, g


def as_encoded(x: Tensor, encoded: Tensor) -> Tensor:
    """Which rows (b, 1, 1) of x (b, n, d) are what the text encoder made of their prompts."""
    if x.shape != encoded.shape:
        raise ValueError(
            f"Another node gives the model {x.shape[1]} tokens of text in {len(x)} rows where the prompts have "
            f"{encoded.shape[1]} in {len(encoded)}, so no word can be given back to its superclass word. Write the "
            "prompt in one piece, or let the concept act at any time, everywhere and with a local lock."
        )
    return (x == encoded.to(x)).all(-1, keepdim=True).all(-2, keepdim=True)
