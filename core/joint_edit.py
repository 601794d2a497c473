"""Several concepts on one model: whether they fit it and each other, and the one edit that they make together.

The projection is joint (key_lock), so the order in which concepts were applied does not matter. What depends on the
concepts alone is prepared once, and copied once to each device; a call adds which rows name which concept.
"""

import logging
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from .acting import AS_ENCODED, Acting, VersionedEdit, Words, given_back, places, version
from .concept import BASES, Concept
from .key_lock import Edit, cosines, joint, overlap, unit

MOST = 8  # concepts in one picture; what is prepared for their subsets doubles with each


def check_fit(concept: Concept, base: str, widths: dict[str, int], encoders: Collection[str],
              others: Collection[Concept]):
    """Raise ValueError where a concept cannot work on a model of this base, these value projections (name -> d_out)
    and these text encoders, or not beside the others that are applied to it."""
    if concept.base != base:
        raise ValueError(
            f"The concept {concept.word} was made for {BASES[concept.base]}, the connected model is {BASES[base]}. "
            f"Load a checkpoint of {BASES[concept.base]}, or tune the concept again on this one."
        )
    learnt = {name: len(o) for name, o in concept.target_output.items()}
    if widths != learnt or set(concept.embedding) != set(encoders):
        raise ValueError(
            f"The concept {concept.word} holds {len(learnt)} value outputs and embeddings for "
            f"{', '.join(sorted(concept.embedding)) or 'no encoder'}; this model has {len(widths)} value projections"
            f"{' of other names or widths' if len(widths) == len(learnt) else ''}. It was tuned on a UNet with other "
            "layers: tune it again on this model."
        )
    for other in others:
        if other.covariance != concept.covariance:
            raise ValueError(
                f"{other.word} and {concept.word} were tuned under different caption statistics "
                f"({other.covariance[:12]} and {concept.covariance[:12]}: another text encoder, clip skip or caption "
                "file), so their gates cannot be combined. Tune one of them again with the other's settings."
            )


class JointEdit:
    """The edit of concepts (one or more) for the rows of `present` (b, j), on its device; see `key_lock.Edit`.

    `on` are the words of those that act, all unless given. `texts` are the versions (b, n, d) of the prompts in whose
    rows the words `known` may stand, by the words given back; see acting.py.
    """

    def __init__(self, concepts: tuple[Concept, ...]):
        if len(concepts) > MOST:
            raise ValueError(f"At most {MOST} concepts work together in one picture. Remove one of them.")
        stack = {name: torch.stack([getattr(c, name) for c in concepts])
                 for name in ("target_input", "key_input", "direction")}
        stack["direction"] = unit(stack["direction"], stack["target_input"])
        M = overlap(stack["direction"], stack["target_input"])
        closest = cosines(M).fill_diagonal_(0).max()
        if closest > 0.99:
            logging.warning("Perfusion: two of the concepts are nearly the same to the text encoder "
                            f"(cosine {closest:.4f}); expect them to mix.")
        self.acting = {c.word: c.acting for c in concepts}
        self.shares = places(self.acting)
        self.fields = stack | {
            "bias": torch.tensor([c.gate_bias for c in concepts]),
            "temperature": torch.tensor([c.temperature for c in concepts]),
            "scale": torch.tensor([c.scale for c in concepts]),
            "joint": joint(M).float(),
            "target_output": {name: torch.stack([c.target_output[name] for c in concepts])
                              for name in concepts[0].target_output},
        }
        self.on = {}  # device -> fields

    def __call__(self, present: Tensor, known: Collection[str] = (), texts: Mapping[Words, Tensor] = {},
                 on: Words | None = None) -> Edit | VersionedEdit:
        on = Words(self.acting) if on is None else on
        edit = self._edit(present, on)
        keys, values = given_back({word: a for word, a in self.acting.items() if word in known}, on)
        if not keys:
            return edit
        read = {words: version(texts, words).to(present.device) for words in (keys, values, AS_ENCODED)}
        local = Words(word for word in on if self.acting[word].lock == "local")
        return VersionedEdit(edit, self._edit(present, local), read[AS_ENCODED], read[keys], read[values])

    def where(self, acts: Callable[[Acting], bool]) -> dict[Words, Tensor]:
        """The share (1, h, w) that each pixel has of every set of words that act, while those do whom `acts` names."""
        now, found = Words(word for word, a in self.acting.items() if acts(a)), {}
        for away, share in self.shares.items():
            found[now - away] = found.get(now - away, 0) + share
        return found

    def _edit(self, present: Tensor, on: Words) -> Edit:
        device = present.device
        if len(on) < len(self.acting):
            present = present * present.new_tensor([word in on for word in self.acting])
        if device not in self.on:
            self.on[device] = {name: f.to(device) if torch.is_tensor(f) else {n: o.to(device) for n, o in f.items()}
                               for name, f in self.fields.items()}
        return Edit(present=present, **self.on[device])
