"""`python -m bench e4t`: the domains that ours is measured against, on the pictures, steps and batches of ours.

    e4t-full      E4T as published (Gal et al. 2023, arXiv 2302.12228): embedding and weight offsets, no edit. Whoever
                  is to be drawn, all weights are then tuned, from those with the offsets in them.
    e4t-tokens    the embedding alone, which alone is then tuned

They differ from ours by what is learnt, and from the paper by what ours differs in: the encoder reads the tower alone,
its offset is measured against the superclass word, and the embedding is constant. Where one stopped, it goes on.

Letters: b batch · l layers · w width · c h w latent.
"""

import argparse
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..core import domain as domains
from ..core import encoder as e4t
from ..core.checkpoint import Checkpoint
from ..core.domain import Domain
from ..core.host_diffusers import DiffusersHost
from ..core.school import Schooling, train
from ..core.tower import tokens_of
from ..core.train_domain import PENALTY, WORD
from ..core.weight_offset import Offset, modulated, start
from . import domain
from .examine import DEMO, SUPERCLASS, miniature, tower
from .make_world import WORK

KINDS = "e4t-full", "e4t-tokens"
FILES = {kind: WORK / f"{SUPERCLASS}-{kind}.safetensors" for kind in KINDS}
LEARNING_RATE = 1e-3
HELD = 4  # pictures that are not trained on


class Course(nn.Module):
    """What is learnt and its loss, for `school.train`; see `train_domain.Course`."""

    def __init__(self, kind: str, host, superclass: str, seen: Tensor):
        super().__init__()
        self.host, self.superclass, self.vector = host, superclass, host.embedding(superclass)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = e4t.Encoder(*seen.shape[1:], {name: len(v) for name, v in self.vector.items()}, {})
        self.encoder.standardise(seen)
        found = start(host.attention) if kind == "e4t-full" else {}
        self.names = list(found)
        self.factors = nn.ParameterList(factor for offset in found.values() for factor in offset)

    @property
    def offsets(self) -> dict[str, Offset]:
        """They belong to the course: their tensors are its parameters."""
        return dict(zip(self.names, map(Offset, self.factors[::2], self.factors[1::2]), strict=True))

    def forward(self, undo: ExitStack, latents: Tensor, weight: Tensor, seen: Tensor, captions: list[str],
                noise: Tensor, time: Tensor):
        E, _ = self.encoder(seen.float())
        lines = [caption.replace("{}", WORD) for caption in captions]
        context, _ = self.host.encode(lines, WORD, e4t.embedding(self.vector, E))
        undo.enter_context(modulated(self.host.attention, self.offsets))
        error = self.host.errors(latents, noise, time, context, "").mean()
        length = e4t.penalty(self.vector, E)
        return error + PENALTY * length, {"error": error.item(), "length": length.item()}

    def domain(self, seer: str, training: dict) -> Domain:
        """What was learnt. `seer` is the tower's hash."""
        offsets = {name: Offset(*(factor.detach() for factor in offset)) for name, offset in self.offsets.items()}
        return Domain(self.host.base, self.host.prediction, self.superclass, seer, self.encoder, offsets, training)


def started(method: str, host, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Offset]]:
    """(embedding, weight offsets) that tuning starts from, of pictures (m, 3, H, W)."""
    learnt = domains.load(FILES[method])
    E, _ = learnt.encoder(tokens_of(tower(), images.movedim(1, -1), learnt.encoder.read))  # BCHW -> BHWC
    return {name: v.mean(0) for name, v in e4t.embedding(host.embedding(SUPERCLASS), E).items()}, learnt.offsets


def album(host):
    """Latents, class tokens and captions of the pictures of `bench domain`."""
    latents, tokens, captions = [], [], []
    for first in range(0, domain.PICTURES, domain.CHUNK):
        pictures, said = domain.chunk(first)
        images = (pictures.float() / 255).movedim(1, -1)  # BCHW -> BHWC
        latents.append(host.latents(images).half())
        tokens.append(tokens_of(tower(), images, e4t.Encoder.read).half())
        captions += said
        print(f"\rpictures read: {len(captions)} of {domain.PICTURES}", end="", flush=True)
    return torch.cat(latents), torch.cat(tokens), captions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--steps", type=int, default=domain.SETTINGS["steps"])
    arguments = parser.parse_args()
    host = DiffusersHost(miniature(), SUPERCLASS, DEMO)
    latents, tokens, captions = album(host)

    def data(rows, turns):
        said = [captions[k][turn % len(captions[k])] for k, turn in zip(rows.tolist(), turns.tolist())]
        x = latents[rows].float()
        return x, torch.ones_like(x[:, :1]), tokens[rows].float(), said

    def say(schooled):
        print(f"\rstep {schooled.step} of {schooled.steps}, error {schooled.numbers['error']:.4f}, "
              f"{schooled.seconds_left:.0f} s left ", end="", flush=True)

    for kind in arguments.kinds:
        settings = Schooling(arguments.steps, domain.SETTINGS["batch"], learning_rate=LEARNING_RATE)
        checkpoint = Checkpoint(FILES[kind].with_suffix(".pt"), {"kind": kind, "tower": tower().hash[:16]})
        with host.training(latents[:1].float()):
            course = Course(kind, host, SUPERCLASS, tokens.float())
            train(course, data, len(latents) - HELD, settings, checkpoint=checkpoint, every=250, report=say)
        facts = {"steps": settings.steps, "batch": settings.batch, "learning_rate": LEARNING_RATE}
        print(f"\n{domains.save(course.domain(tower().hash, facts), FILES[kind])}")
