"""When and where concepts act on a diffusers pipeline: the versions of its prompts, and the edits of its UNet's calls.

Attention is computed anew under each edit where a region asks for several, because diffusers takes the number of rows
from the text; ComfyUI's side (region.py) computes it once with more rows, so that the two tell on each other.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .acting import AS_ENCODED, Words, versions
from .apart import members, reads, split, weights
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


def way_up(unet) -> list[nn.Module]:
    """The cross-attentions of the decoder."""
    return [module for name, module in unet.named_modules() if name.startswith("up_blocks") and name.endswith("attn2")]


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
def acting(unet, projections: Mapping[str, nn.Module], concepts: Sequence[Concept], places: Tensor,
           texts: Mapping[Words, Tensor], last: int):
    """While open, the UNet is edited at each time by the concepts that act then, for rows in which `places` (b, n, j)
    says where words stand, and of which `texts` are the versions; `last` is the timestep with which sampling begins.
    The first call in which concepts are kept apart is made twice, see apart.py."""
    on = tuple(concept for concept in concepts if not concept.off)
    joint = JointEdit(on) if on else None
    words, present, r = [c.word for c in on], places.amax(1), None

    def forward_of(plain):
        def forward(sample, timestep, *args, **kwargs):
            nonlocal r
            time = 1 - float(timestep) / last
            where = joint.where(lambda a: a.at(time))
            now = Words(c.word for c in on if c.acting.at(time))
            each = members(joint.acting, now)
            if present[:, [words.index(word) for word in each]].sum(1).gt(1).any():
                if r is None:
                    with (edited(projections, joint(present, words, texts, now - each)),
                          reads(way_up(unet), places, sample.shape[-2:]) as found):
                        plain(sample, timestep, *args, **kwargs)
                    r = weights(found)
                some = present.any(0).nonzero().flatten().tolist()
                where = split(where, joint.acting, [words[k] for k in some], r[:, some])
            edits = [joint(present, words, texts, of) for of in where]
            swap = (edited(projections, *edits) if len(edits) == 1 else
                    blended(unet, projections, edits, Blend(where.values(), sample.shape[-2:])))
            with swap:
                return plain(sample, timestep, *args, **kwargs)
        return forward

    with swapped([(unet, forward_of)] if on else []):
        yield
