"""Train Domain: a folder of pictures becomes an encoder (E4T, arXiv 2302.12228, under the lock of 2305.01644).

    E, u = encoder(f)       v* = v(superclass) + 0.1 E      c = encode(a caption with v*)
    loss = Σ m |ε̂ − ε|² / Σ m + λ R(E)      ε̂ of the plain model, under the edit that u and the word in c make

The encoder alone is learnt, on the graph that a finished concept is used in (row_edit.py), so that nothing has to be
fitted afterwards. The paper learns weight offsets beside an encoder of embeddings: what such a domain knows stays in
its offsets for the most part, and a concept cannot take them along (bench/research.md has the table).

A caption that says what else is in the picture leaves to the encoder what only the picture can say; without captions
one of the templates is used.

Letters: b batch · m pictures · l layers · w width · n tokens · c h w latent.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from . import encoder as e4t
from .domain import Domain
from .host import Host
from .key_lock import edited
from .members import members_of
from .row_edit import RowEdit
from .tune import TEMPLATES

PENALTY = 0.01  # λ
WORD = "<new>"  # in training captions; concepts have words of their own


class Course(nn.Module):
    """What is learnt of a domain, and the loss of a batch of it. `host` has to be in `training` while it is used.

    `seen` are class tokens (m, l, w) of pictures like those that it will learn from. `begun` is a domain whose encoder
    it begins with, of the same base and tower; without one a picture starts as the superclass word. Raises ValueError
    for a domain of public E4T files.
    """

    def __init__(self, host: Host, superclass: str, seen: Tensor, seed: int = 0, hidden: int = e4t.HIDDEN,
                 begun: Domain | None = None):
        super().__init__()
        if begun and not isinstance(begun.encoder, e4t.Encoder):
            raise ValueError("A domain of public E4T files cannot be trained on: its encoder is of another kind. Begin "
                             "without one, or with one that was trained here.")
        hidden = len(begun.encoder.tower[0].bias) if begun else hidden
        self.host, self.superclass = host, superclass
        self.vector = host.embedding(superclass)
        self.register_buffer("C_inv", host.inverse_covariance()[0].float(), persistent=False)
        values = {name: len(module.weight) for name, module in host.projections.items() if name.endswith("to_v")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = e4t.Encoder(*seen.shape[1:], {k: len(v) for k, v in self.vector.items()}, values, hidden)
        self.encoder.standardise(seen)
        if begun:
            self.encoder.load_state_dict(begun.encoder.state_dict())
        self.members = members_of(seen)

    def forward(self, undo: ExitStack, latents: Tensor, weight: Tensor, seen: Tensor, captions: list[str],
                noise: Tensor, time: Tensor):
        """(loss, {part of it: number}) of latents (b, c, h, w), what they weigh (b, 1, h, w), class tokens (b, l, w),
        captions with {} once, noise as the latents, and times (b) in [0, 1).

        The model stays edited until `undo` is closed, after the way back: where memory is short, that computes again.
        """
        with torch.autocast(self.host.device.type, enabled=False):  # C⁻¹ needs more digits
            E, u = self.encoder(seen.float())
            lines = [caption.replace("{}", WORD) for caption in captions]
            context, at = self.host.encode(lines, WORD, e4t.embedding(self.vector, E))
            meet = undo.enter_context(edited(self.host.projections, RowEdit(context, at, self.C_inv, u)))
        context = context.to(self.host.dtype)
        meet(context)
        errors = self.host.errors(latents, noise, time, context, TEMPLATES[0].replace("{}", self.superclass))
        error = ((weight * errors).mean(1).sum((1, 2)) / weight.sum((1, 2, 3))).mean()
        length = e4t.penalty(self.vector, E)
        return error + PENALTY * length, {"error": error.item(), "length": length.item()}

    def domain(self, tower: str, training: dict) -> Domain:
        """What was learnt by now, as a copy on the CPU. `tower` is its hash."""
        encoder = e4t.Encoder.of({name: t.cpu().float().clone() for name, t in self.encoder.state_dict().items()})
        return Domain(self.host.base, self.host.prediction, self.superclass, tower, encoder, {}, training,
                      self.members)
