"""When a concept acts, and which version of its prompt is read meanwhile.

A version of a prompt has some of the concepts' words given back to their superclass words, and is named by these words;
the prompt as it was encoded is the version of none. A concept that does not act is off, as at strength 0: its word is
given back and nothing is edited for it. What a text encoder makes of the versions is kept beside the prompt, because
while a picture is made there is no text encoder at hand.

Letters: b batch · n tokens · d text width · j concepts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .key_lock import Edit

Words = frozenset[str]
AS_ENCODED = Words()


@dataclass(frozen=True, eq=False)
class Acting:
    """The part of sampling in which a concept acts, 0 its start and 1 its end; both ends are in it."""

    start: float = 0.0
    end: float = 1.0

    @property
    def timed(self) -> bool:
        return self.start > 0 or self.end < 1

    def at(self, time: float) -> bool:
        """Whether the concept acts when this part of sampling is done."""
        return self.start <= time <= self.end


def always(acting: Acting) -> bool:
    return True


def given_back(acting: Mapping[str, Acting], acts: Callable[[Acting], bool]) -> Words:
    """The version that is read while those act of whom `acts` says so."""
    return Words(word for word, a in acting.items() if not acts(a))


def versions(acting: Mapping[str, Acting]) -> tuple[Words, ...]:
    """Every version that is read at some time of sampling, the prompt as it was encoded first."""
    ends = sorted({0.0, 1.0, *(time for a in acting.values() for time in (a.start, a.end))})
    times = *ends, *((a + b) / 2 for a, b in pairwise(ends))
    found = {given_back(acting, lambda a, time=time: a.at(time)) for time in times}
    return AS_ENCODED, *sorted(found - {AS_ENCODED}, key=sorted)


def version(texts: Mapping[Words, Tensor], words: Words) -> Tensor:
    """Encodings (b, n, d) of a version. Raises ValueError where the prompts were encoded without it."""
    if words not in texts:
        raise ValueError(
            f"{' and '.join(sorted(words))} should be its superclass word in this part of the sampling, and the "
            "prompts were encoded for another Gate Strength. Connect MODEL and CLIP from the same Apply Perfusion "
            "Concept."
        )
    return texts[words]


class VersionedEdit:
    """For `key_lock.edited`: an edit of the version `text` (b, n, d) of prompts whose encodings are `encoded`.

    A row that another node has changed since it was encoded is read as it comes: its versions are unknown.
    """

    def __init__(self, edit: Edit, encoded: Tensor, text: Tensor):
        self.edit, self.encoded, self.text = edit, encoded, text
        self.target_output = edit.target_output

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.edit(torch.where(as_encoded(x, self.encoded), self.text.to(x), x))


def as_encoded(x: Tensor, encoded: Tensor) -> Tensor:
    """Which rows (b, 1, 1) of x (b, n, d) are what the text encoder made of their prompts."""
    if x.shape != encoded.shape:
        raise ValueError(
            f"Another node gives the model {x.shape[1]} tokens of text in {len(x)} rows where the prompts have "
            f"{encoded.shape[1]} in {len(encoded)}, so a concept that does not act everywhere and at any time cannot "
            "be given back to its superclass word. Write the prompt in one piece, or set start_percent to 0 and "
            "end_percent to 1."
        )
    return (x == encoded.to(x)).all(-1, keepdim=True).all(-2, keepdim=True)
