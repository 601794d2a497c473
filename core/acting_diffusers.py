"""When and where concepts act on a diffusers pipeline: the versions of its prompts, and the edits of its UNet's calls.

Attention is computed anew under each edit where a region asks for several, because diffusers takes the number of rows
from the text; ComfyUI's side (region.py) computes it once with more rows, so that the two tell on each other.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .acting import AS_ENCODED, Words, versions
from .concept import Concept
from .joint_edit import JointEdit
from .key_lock import edited
from .prompt_diffusers import Encoders, Token, read
from .region import Blend
from .swap import swapped


@torch.no_grad()
def texts_of(encoders: Encoders, prompts: list[str], concepts: Sequence[Concept], words: Mapping[str, Token],
             encoded: Tensor) -> dict[Words, Tensor]:
    """Every version (b, n, d) of prompts encoded as `encoded` that is read while pictures are made."""
    found = {AS_ENCODED: encoded}
    for back in versions({c.word: c.acting for c in concepts if not c.off})[1:]:
        found[back], _ = read(encoders, prompts, {word: Token({}, token.superclass) if word in back else token
                                                  for word, token in words.items()})
    return found


def blended(unet, projections: Mapping[str, nn.Module], edits: Sequence, blend: Blend):
    """While open, every cross-attention is computed once under each edit and answers with their blend."""

    def under(layer):
        own = {name: module for name, module in projections.items() if module in (layer.to_k, layer.to_v)}

        def forward_of(plain):
            def forward(*args, **kwargs):
                answers = []
                for edit in edits:
                    with edited(own, edit):
                        answers.append(plain(*args, **kwargs))
                return blend(torch.stack(answers, 1))
            return forward
        return forward_of

    return swapped((layer, under(layer)) for name, layer in unet.named_modules() if name.endswith("attn2"))


@contextmanager
def acting(unet, projections: Mapping[str, nn.Module], concepts: Sequence[Concept], present: Tensor,
           texts: Mapping[Words, Tensor], last: int):
    """While open, the UNet is edited at each time by the concepts that act then, for rows of which `present` (b, j)
    and `texts` tell; `last` is the timestep with which sampling begins."""
    on = tuple(concept for concept in concepts if not concept.off)
    joint = JointEdit(on) if on else None

    def forward_of(plain):
        def forward(sample, timestep, *args, **kwargs):
            time = 1 - float(timestep) / last
            where = joint.where(lambda a: a.at(time))
            edits = [joint(present, [c.word for c in on], texts, now) for now in where]
            swap = (edited(projections, *edits) if len(edits) == 1 else
                    blended(unet, projections, edits, Blend(where.values(), sample.shape[-2:])))
            with swap:
                return plain(sample, timestep, *args, **kwargs)
        return forward

    with swapped([(unet, forward_of)] if on else []):
        yield
