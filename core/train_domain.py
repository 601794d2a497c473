"""Train Domain: a folder of pictures becomes an encoder and weight offsets (E4T, arXiv 2302.12228, §3).

    F  = the UNet's down blocks, pooled, of z_t at t, without offsets and gradient; asked for "a photo of a cat"
    E  = encoder(f, F)      v* = v(superclass) + 0.1 E      c = encode(a caption with v*)
    loss = Σ m |ε̂ − ε|² / Σ m + λ |E|²      ε̂ from the UNet with W ⊙ (1 + Δ), of the same z_t and t

Encoder and offsets are learnt, all else is frozen. A caption that says what else is in the picture leaves to the
encoder what only the picture can say; without captions one of the templates is used.

Letters: b batch · l layers · w width · n tokens · c h w latent.
"""

import torch
from torch import Tensor, nn

from . import encoder as e4t
from .domain import Domain
from .host import Host
from .tune import TEMPLATES
from .weight_offset import Offset, modulated, start

PENALTY = 0.01  # λ; the public code's
WORD = "<new>"  # in training captions; concepts have words of their own


class Course(nn.Module):
    """What is learnt of a domain, and the loss of a batch of it. `host` has to be in `training` while it is used.

    For the widths of what it reads it gets class tokens (m, l, w) and latents (m, c, h, w) of some pictures.
    """

    def __init__(self, host: Host, superclass: str, seen: Tensor, latents: Tensor, seed: int = 0,
                 hidden: int = e4t.HIDDEN, penalty: float = PENALTY):
        super().__init__()
        self.host, self.superclass, self.penalty = host, superclass, penalty
        self.vector = host.embedding(superclass)
        x = latents[:1].float().to(host.device)
        blocks = [g.shape[1] for g in self.features(x, torch.zeros_like(x), torch.tensor([0.5], device=x.device))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = e4t.Encoder(*seen.shape[1:], blocks, {k: len(v) for k, v in self.vector.items()}, hidden)
        offsets = start(host.attention, seed)
        self.names = list(offsets)
        self.outputs = nn.ParameterList(offset.output for offset in offsets.values())
        self.inputs = nn.ParameterList(offset.input for offset in offsets.values())

    @property
    def offsets(self) -> dict[str, Offset]:
        return {name: Offset(a, c) for name, a, c in zip(self.names, self.outputs, self.inputs)}

    def features(self, latents: Tensor, noise: Tensor, time: Tensor) -> list[Tensor]:
        """F of latents (b, c, h, w) with noise at times (b)."""
        prompt = e4t.Encoder.prompt.replace("{}", self.superclass)
        return self.host.features(latents, noise, time, prompt, e4t.Encoder.places)

    def modulated(self):
        """The model with the offsets as they are, for as long as this is open; see `weight_offset.modulated`."""
        return modulated(self.host.attention, self.offsets)

    def forward(self, latents: Tensor, weight: Tensor, seen: Tensor, felt: list[Tensor], captions: list[str],
                noise: Tensor, time: Tensor):
        """(loss, {part of it: number}) of latents (b, c, h, w), what they weigh (b, 1, h, w), class tokens (b, l, w),
        `features` of the same latents, captions with {} once, noise as the latents, and times (b) in [0, 1).

        It and its way back belong inside `modulated`, and `features` outside.
        """
        E = self.encoder(seen, felt)
        context, _ = self.host.encode([c.replace("{}", WORD) for c in captions], WORD, e4t.embedding(self.vector, E))
        errors = self.host.errors(latents, noise, time, context, TEMPLATES[0].replace("{}", self.superclass))
        error = ((weight * errors).mean(1).sum((1, 2)) / weight.sum((1, 2, 3))).mean()
        length = e4t.penalty(E)
        return error + self.penalty * length, {"error": error.item(), "length": length.item()}

    def domain(self, tower: str, training: dict) -> Domain:
        """What was learnt by now, as a copy on the CPU. `tower` is its hash."""
        encoder = e4t.Encoder.of({name: t.cpu().float().clone() for name, t in self.encoder.state_dict().items()})
        offsets = {name: Offset(*(t.detach().cpu().float().clone() for t in offset))
                   for name, offset in self.offsets.items()}
        return Domain(self.host.base, self.host.prediction, self.superclass, tower, encoder, offsets, training)
