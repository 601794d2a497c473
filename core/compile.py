"""Compile: a model that the public E4T program has tuned on a picture becomes a concept for its untuned base.

    W  a value projection of the base      W' the same as tuned, offsets in it      β, τ  the gate of training
    e_p = encode(frame_p(v̄)) at the word, i* their mean;  s_p, g_p their similarity and gate (see `key_lock`)
    o* = argmin Σ_p |W' e_p − (W (e_p − s_p i*) + g_p o*)|²
       = Σ_p g_p (W' e_p − W (e_p − s_p i*)) / Σ_p g_p²

v̄, i* and the lock of the keys are those of `encode`, of the tuned model: it is the one that its encoder has learnt to
look at. Lossy: the tuning changed the whole UNet, and of that remains what the values answer at the word.

Letters: p frames · d text width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import key_lock
from .concept import Concept
from .domain import Domain
from .encode import encode, values
from .host import Host
from .tune import TEMPLATES, each_at_the_word


@torch.no_grad()
def compiled(host: Host, domain: Domain, seen: Tensor, latents: Tensor, word: str,
             base: Mapping[str, Tensor]) -> Concept:
    """The concept of a tuned model: `host` has the tuned UNet, `domain` what was tuned beside it, `base` the weights
    (d_out, d) that the value projections had before. `seen` and `latents` as in `encode`.

    Raises ValueError where the domain's offsets do not fit the host's model.
    """
    concept = encode(host, domain, seen, latents, domain.superclass, word)
    frames = host.frames() or list(TEMPLATES)
    e = each_at_the_word(host, word, concept.embedding, frames).cpu().double()  # (p, d)
    s = e @ concept.direction.double()
    g = key_lock.gate(s, key_lock.TRAIN_BIAS, key_lock.TRAIN_TEMPERATURE)
    whole = g @ e / (g @ g)  # what W' reads, by linearity
    rest = whole - g @ s / (g @ g) * concept.target_input.double()  # and what W
    outputs = {name: (tuned.double() @ whole - base[name].double() @ rest).float()
               for name, tuned in values(host, domain)}
    facts = {"imported": domain.training["imported"], "lossy": True, "frames": len(frames)}
    return concept.replace(target_output=outputs, domain="", training=concept.training | facts)
