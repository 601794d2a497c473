"""`python -m bench dial`: the dial of one tuned concept, from the plain model to the whole concept, beside its peers'.

Every creature is learnt from one picture, by Quick Tune in five steps from what the domain encoded and by each peer,
and drawn in PROMPTS contexts unlike its picture's, SEEDS times each, from the same noise:

    quick-tune    at every strength of MARKS; with keys under a global lock at some of them
    lora          after its best steps, at some strengths of W + s BA; "lora and word" moves its word's embedding from
                  the superclass word's by s as well, as our dial does
    dreambooth, textual-inversion    after some steps

A creature's scores are kept in a file of their own beside those of `bench creatures`, by the same rules. When
all are there, or with `--again`, dial_table.py makes a table and a picture of them.
"""

import argparse
import json
import time
from contextlib import contextmanager
from functools import partial

import torch

from ..core.acting import Acting
from ..core.concept import Concept
from ..core.host_diffusers import DiffusersHost
from ..core.tune import STEPS_FROM_CONCEPT, Lesson, Tuning, fit, schedule
from . import creatures, metrics, peers, world
from . import reader as judge
from .creatures import EMBEDDING_RATE, runs_folder
from .examine import DEMO, DEVICE, GUIDANCE, SAMPLING, SUPERCLASS, WORD, creature, gallery, miniature, ours

PROMPTS, SEEDS = 8, 2
MARKS = [k / 20 for k in range(21)]
SOME = (0.25, 0.5, 0.75, 1.0)
PEERS = {"lora": (150,), "dreambooth": (15, 50, 150), "textual-inversion": (15, 50, 150)}  # and after which steps
GLOBAL, WITH_WORD = "quick-tune, global lock", "lora and word"


class Sitter:
    """A test creature as its methods see it: one picture, and what is asked for."""

    def __init__(self, host: DiffusersHost, k: int):
        self.host, self.k = host, k
        self.who, contexts, self.wanted = creature("test", k, PROMPTS)
        self.training = contexts[:1]
        self.images = world.render(SUPERCLASS, self.who, self.training)[0]
        self.latents = host.latents(fit(self.images.movedim(1, -1), world.SIZE)).to(DEVICE)  # BCHW -> BHWC
        self.weight = torch.ones_like(self.latents[:, :1])

    def lessons(self, settings: Tuning):
        """What a learner's `step` takes, once for every step."""
        generator = torch.Generator().manual_seed(settings.seed)
        for sample in schedule(settings, 1, generator):
            yield self.latents, self.weight, sample, generator

    def tuned(self, steps: int = STEPS_FROM_CONCEPT) -> Concept:
        """What our domain makes of the picture, and so many steps of that."""
        concept = creatures.encoded(self.host, self.images, self.latents)
        settings = Tuning(steps=steps, resolution=world.SIZE)
        with self.host.training(self.latents):
            lesson = Lesson(self.host, SUPERCLASS, WORD, concept.embedding, self.host.inverse_covariance()[0], settings,
                            concept)
            for lesson_of in self.lessons(settings):
                lesson.step(*lesson_of)
        return concept.replace(**lesson.learnt())

    @contextmanager
    def peer(self, method: str, word: str = WORD):
        """A learner of another method at its best learning rate, on the host while open."""
        rate = creatures.chosen()[method]
        with self.host.training(self.latents), peers.learning(
                method, self.host, word, rate, EMBEDDING_RATE, Tuning().templates, self.host.embedding(SUPERCLASS),
                {}) as learner:
            yield learner

    def scores(self, draw) -> dict[str, float]:
        """Means over what a `draw` makes of the contexts wanted."""
        wanted = self.wanted.repeat(SEEDS, 1)
        seeds = [1000 * self.k + n for n in range(len(wanted))]
        made = draw(world.context_caption(wanted, WORD), seeds).movedim(-1, 1).cpu()  # BHWC -> BCHW
        line_up = torch.cat([gallery(), self.who])
        found = metrics.summary(
            SUPERCLASS, judge.load().read(made), self.who.expand(len(wanted), -1), wanted,
            self.training.expand(len(wanted), -1), line_up, torch.full((len(wanted),), len(line_up) - 1))
        return {name: round(score.float().mean().item(), 5) for name, score in found.items()}


def lora_at(learner, strength: float, plain, learnt):
    """Turn a LoRA to a strength, and its word to what lies so far from the superclass word's embedding."""
    for module in learner.low_rank:
        module.parametrizations.weight[0].scale = strength
    learner.embedding = {name: plain[name].to(v).lerp(v, strength) for name, v in learnt.items()}


def run(host: DiffusersHost, k: int) -> dict:
    """One creature and its rows."""
    sitter, rows = Sitter(host, k), []

    def mark(method, steps, strength, draw, seconds):
        rows.append({"method": method, "steps": steps, "strength": strength, "seconds": round(seconds, 3)}
                    | sitter.scores(draw))

    begun = time.process_time()
    concept = sitter.tuned()
    seconds = time.process_time() - begun
    for strength in MARKS:
        mark("quick-tune", STEPS_FROM_CONCEPT, strength, partial(ours, host.pipe, (concept.at(strength),)), seconds)
    for strength in SOME:
        locked = concept.at(strength).replace(acting=Acting(lock="global"))
        mark(GLOBAL, STEPS_FROM_CONCEPT, strength, partial(ours, host.pipe, (locked,)), seconds)
    plain = host.embedding(SUPERCLASS)
    for method, stops in PEERS.items():
        with sitter.peer(method) as learner:
            spent, draw = 0.0, partial(learner.draw, sampling=SAMPLING, guidance=GUIDANCE)
            for step, lesson in enumerate(sitter.lessons(Tuning(steps=stops[-1], resolution=world.SIZE)), 1):
                begun = time.process_time()
                learner.step(*lesson)
                spent += time.process_time() - begun
                if step in stops:
                    mark(method, step, 1.0, draw, spent)
            if method == "lora":
                learnt = learner.embedding
                for strength in SOME[:-1]:
                    lora_at(learner, strength, plain, learnt)
                    mark(WITH_WORD, stops[-1], strength, draw, spent)
                    learner.embedding = learnt
                    mark("lora", stops[-1], strength, draw, spent)
    return {"creature": k, "rows": rows}


def share_out(doc: str, kind: str, size: int, run, gather):
    """The command of a bench that keeps a file for each `size` test creatures: `run(host, k)` answers what is in the
    k-th, `gather()` makes a table when all are there."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32, help="how many test creatures")
    parser.add_argument("--shard", default="0/1", help="this process's share: 0/2 is the first of two")
    parser.add_argument("--again", action="store_true", help="only gather what was run")
    arguments = parser.parse_args()
    first, shards = map(int, arguments.shard.split("/"))
    if not arguments.again:
        if shards > 1:
            torch.set_num_threads(1)
        host = DiffusersHost(miniature(), SUPERCLASS, DEMO)
        for k in range(first, arguments.n // size, shards):
            path = runs_folder() / f"{kind}-{k:03}-{creatures.domain_of('quick-tune')[:8]}.json"
            if not path.exists():
                done = {"commit": creatures.commit()} | run(host, k)
                path.with_suffix(".part").write_text(json.dumps(done, allow_nan=False), encoding="utf-8")
                path.with_suffix(".part").replace(path)
                print(path.stem, flush=True)
    if shards == 1:
        gather()


def main():
    from . import dial_table  # which imports this file

    share_out(__doc__, "dial", 1, run, dial_table.gather)
