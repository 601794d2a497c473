"""Encode Concept: a picture and a domain become a concept with no training at all.

    E, u = mean of encoder(f)             over the pictures
    v̄  = v(superclass) + 0.1 E
    i* = mean over the frames of encode(frame(v̄)) at the word, as in tune.py
    o* = W i* + u                         for a domain of public E4T files o* = (W ⊙ (1 + Δ)) i*
    keys are locked to i* itself: to what the encoder saw, and not to the superclass word, which knows nothing of it

A picture that is none of the domain's family (members.py) is left out. Where no picture is left, nothing is encoded:
the concept is the superclass word, as Quick Tune without a domain begins with it, and `far` says so.

The encoder of the public E4T files reads the UNet too and answers anew at each step of its sampling; a concept is
constant, so its answers are averaged over DRAWS of a time and noise. Times are spread evenly, each with noise of its
own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import encoder as e4t
from . import key_lock
from .concept import BASES, Concept, check_word
from .domain import Domain
from .encoder import Encoder
from .host import Host
from .tune import STEPS, TEMPLATES, at_the_word
from .weight_offset import check_fit, modulate, modulated

DRAWS = 16


def check(domain: Domain, base: str, prediction: str, tower: str, superclass: str):
    """Raise ValueError where the domain was trained on another base, with another tower (its hash), or for another
    superclass, whose word its answers are offsets of."""
    if domain.superclass != superclass.strip():
        raise ValueError(f"This domain is of the superclass '{domain.superclass}', and '{superclass}' was given. Write "
                         f"'{domain.superclass}', or load a domain of that kind.")
    if domain.prediction != prediction:
        raise ValueError(f"This domain was trained on a model that predicts {domain.prediction}, and the connected one "
                         f"predicts {prediction}. Load the model that it was trained on, or one like it.")
    if domain.base != base:
        raise ValueError(f"This domain was trained on {BASES[domain.base]} and the connected model is {BASES[base]}. "
                         "Load a model of that family, or another domain.")
    if domain.tower != tower:
        raise ValueError("This domain was trained with another vision tower than the connected CLIP vision model. Load "
                         f"the one that its page names (its hash begins with {domain.tower[:12]}, this one's with "
                         f"{tower[:12]}).")


def values(host: Host, domain: Domain) -> Iterator[tuple[str, Tensor]]:
    """Every value projection and its weight (d_out, d) under the domain's offsets, on the CPU in fp32, one by one."""
    for name, module in host.projections.items():
        if name.endswith("to_v"):
            weight = module.weight.cpu()
            yield name, modulate(weight, domain.offsets[name]) if name in domain.offsets else weight.float()


@torch.no_grad()
def encode(host: Host, domain: Domain, seen: Tensor, latents: Tensor, superclass: str, word: str, seed: int = 0,
           draws: int = DRAWS) -> Concept:
    """The concept of pictures of which the domain's encoder has `read` the tokens `seen` (m, l, w) and whose latents
    are (m, c, h, w). Pictures that are far from the domain's are left out; see `far`.

    Raises ValueError where the domain's offsets do not fit the host's model.
    """
    check_word(word)
    check_fit(host.attention, domain.offsets)
    away = domain.members.far(seen) if domain.members else torch.zeros(len(seen), dtype=torch.bool)
    nothing, left_out = bool(away.all()), {"far": int(away.sum())} if away.any() else {}
    if nothing:
        embedding, u = host.embedding(superclass), {}
    else:
        E, u = domain.encoder(seen[~away]) if isinstance(domain.encoder, Encoder) else (
            drawn(host, domain, seen, latents, seed, draws), {})
        embedding = {name: v.mean(0) for name, v in e4t.embedding(host.embedding(superclass), E).items()}
    mean = at_the_word(host, word, embedding, host.frames() or list(TEMPLATES)).cpu()
    C_inv, covariance, statistics = host.inverse_covariance()
    direction, energy = key_lock.direction(C_inv, mean)
    return Concept(base=host.base, prediction=host.prediction, superclass=superclass, word=word, embedding=embedding,
                   target_input=mean, key_input=mean, direction=direction.float(),
                   target_output={name: weight @ mean + (u[name].mean(0) if u else 0)
                                  for name, weight in values(host, domain)},
                   energy=energy, covariance=covariance, domain="" if nothing else domain.hash,
                   training=statistics | {"steps": 0, "pictures": len(seen)} | left_out)


def far(concept: Concept) -> str:
    """What has to be said of pictures that were left out of a concept, a sentence or nothing."""
    if concept.blank:
        return (f"No picture looks like a {concept.superclass} that the domain knows, so nothing was encoded: the "
                f"concept is the plain word. Quick Tune learns it from there, {STEPS} steps are advised.")
    n = concept.training.get("far")
    return f"Pictures left out because they look like no {concept.superclass} that the domain knows: {n}." if n else ""


def drawn(host: Host, domain: Domain, seen: Tensor, latents: Tensor, seed: int, draws: int) -> dict[str, Tensor]:
    """What the encoder of public files answers, (draws · m, d) for each text encoder."""
    generator, answers = torch.Generator().manual_seed(seed), []
    with modulated(host.attention, domain.offsets):
        for k in range(draws):
            time = torch.full((len(latents),), (k + 0.5) / draws, device=latents.device)
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            felt = host.features(latents, noise, time)
            answers.append(domain.encoder(seen, [x.cpu() for x in felt]))
    return {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
