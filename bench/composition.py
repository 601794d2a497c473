"""`python -m bench composition`: several concepts on one model, and two or three of one superclass in one prompt.

Test creatures come in groups of eight, each learnt by Quick Tune in five steps; two that follow each other are a pair.
Drawn are PROMPTS contexts, SEEDS times each, with the word of one, of a pair or of three:

    one      beside 0, 1, 3 and 7 other concepts that are applied and not named
    two      joint: the edits act everywhere · apart: core/apart.py · halves: each has a region, the half that the
             prompt names · lora: both stacked · custom-diffusion: one model learnt from both, as its paper does · words
    three    joint and apart; in this world a picture holds two subjects, so two can be read and no more

A creature is *present* where what is read of its place is nearer to it than to the others that are asked for and to as
many of the gallery as make eight. `--shard` shares the groups out. When all are there, or with `--again`,
composition_table.py makes a table of them; the time that it takes is composition_speed.py's.
"""

import torch

from ..core.acting import Acting
from ..core.concept import Concept
from ..core.host_diffusers import DiffusersHost
from ..core.key_lock import cosines, overlap
from ..core.tune import Tuning
from . import composition_table, metrics, world
from . import reader as judge
from .creatures import EMBEDDING_RATE
from .dial import PROMPTS, SEEDS, Sitter, share_out
from .examine import GUIDANCE, SAMPLING, SUPERCLASS, gallery, ours

GROUP, LINE_UP = 8, 8
WORDS = tuple(f"<{name}>" for name in ("mimi", "kiki", "popo", "lulu", "nana", "toto", "bibi", "fifi"))
STRENGTHS = (0.75, 1.0)
STEPS = 150  # of the peers, the best on dev creatures


def crowd(sitter: Sitter):
    """The sitter's contexts with another subject beside it, left and right in turns."""
    wanted = sitter.wanted.clone()
    wanted[:, world.COMPANY] = world.TWO
    wanted[:, world.PLACE] = torch.tensor([0, 2]).repeat(PROMPTS // 2)
    return wanted


def other_side(wanted):
    wanted = wanted.clone()
    wanted[:, world.PLACE] = 2 - wanted[:, world.PLACE]
    return wanted


def nearest(believed, asked):
    """Which of those asked for (j, f) is nearest in a line-up (m,), or a number from j on for one of the gallery."""
    line_up = torch.cat([asked, gallery()[: LINE_UP - len(asked)]])
    at = torch.arange(len(line_up))[:, None].expand(-1, len(believed))
    hits = torch.stack([metrics.top1(SUPERCLASS, believed, line_up, index) for index in at])
    return hits.int().argmax(0)


def mean(scores: dict) -> dict[str, float]:
    return {name: round(score.float().mean().item(), 5) for name, score in scores.items()}


def of_one(made, wanted, who, beside) -> dict[str, float]:
    """Scores of pictures made (m, H, W, 3) of one creature (1, f), beside which others (j, f) might have been meant."""
    read = judge.load().read(made.movedim(-1, 1).cpu())
    believed = read.of(SUPERCLASS, wanted)
    return mean({"present": nearest(believed, torch.cat([who, beside])) == 0,
                 "identity": metrics.identity(SUPERCLASS, believed, who.expand(len(wanted), -1))["identity"],
                 "alignment": metrics.alignment(read, wanted, SUPERCLASS)})


def of_many(made, wanted, asked) -> dict[str, float]:
    """Scores of pictures of creatures (j, f), the first where the context wants it and the second on the other side."""
    read = judge.load().read(made.movedim(-1, 1).cpu())
    sides = [read.of(SUPERCLASS, w) for w in (wanted, other_side(wanted))]
    found = torch.stack([nearest(side, asked) for side in sides])  # (2, m)
    own = torch.stack([metrics.identity(SUPERCLASS, side, who.expand(len(wanted), -1))["identity"]
                       for side, who in zip(sides, asked)])
    swapped = torch.stack([metrics.identity(SUPERCLASS, side, who.expand(len(wanted), -1))["identity"]
                           for side, who in zip(sides, asked[[1, 0]])])
    each = found == torch.tensor([[0], [1]])
    right = metrics.right(read, wanted)
    columns = [k for k in range(right.shape[1]) if k != metrics.PLACE]  # which of two is the first hangs on depth
    some = torch.stack([(found == k).any(0) for k in range(len(asked))])
    return mean({"present": each.float(), "first": each[0], "second": each[1], "both": each.all(0), "identity": own,
                 "other's": swapped, "alignment": right[:, columns], "two": right[:, metrics.COMPANY],
                 "anywhere": some.float()})


class Peers:
    """What the peers learn of a group, and pictures of pairs by them."""

    def __init__(self, sitters):
        self.sitters, self.learnt = sitters, {}

    def lora(self, k):
        """(embedding, update of every weight) of the k-th."""
        if k not in self.learnt:
            with self.sitters[k].peer("lora") as learner:
                for lesson in self.sitters[k].lessons(Tuning(steps=STEPS, resolution=world.SIZE)):
                    learner.step(*lesson)
                self.learnt[k] = ({name: v.detach() for name, v in learner.embedding.items()},
                                  [(m.parametrizations.weight[0].B @ m.parametrizations.weight[0].A).detach()
                                   for m in learner.low_rank])
        return self.learnt[k]

    def stacked(self, ks, prompts, seeds):
        """Pictures by the LoRAs of several, one on the other."""
        each = [self.lora(k) for k in ks]
        with self.sitters[ks[0]].peer("lora", WORDS[ks[0]]) as learner:
            learner.embedding = each[0][0]
            with torch.no_grad():
                for m, *updates in zip(learner.low_rank, *(weights for _, weights in each)):
                    m.parametrizations.weight.original.add_(sum(updates))
            others = {WORDS[k]: embedding for k, (embedding, _) in zip(ks[1:], each[1:])}
            return learner.draw(prompts, seeds, SAMPLING, GUIDANCE, others)

    def custom_diffusion(self, a, b, prompts, seeds):
        """Pictures by one model that has learnt from two in turns, each with a word and an embedding of its own."""
        settings = Tuning(steps=STEPS, resolution=world.SIZE)
        with self.sitters[a].peer("custom-diffusion", WORDS[a]) as learner:
            second = {name: v.clone().requires_grad_() for name, v in
                      self.sitters[b].host.embedding(SUPERCLASS).items()}
            learner.optimizer.add_param_group({"params": list(second.values()), "lr": EMBEDDING_RATE})
            first = learner.embedding
            for lessons in zip(*(self.sitters[k].lessons(settings) for k in (a, b))):
                for lesson, learner.word, learner.embedding in zip(lessons, (WORDS[a], WORDS[b]), (first, second)):
                    learner.step(*lesson)
            return learner.draw(prompts, seeds, SAMPLING, GUIDANCE, {WORDS[a]: first})


def halves(pipe, pair: tuple[Concept, Concept], wanted, prompts, seeds):
    """Pictures with each of a pair in the half of the picture that its prompt means."""
    left = torch.ones(1, 16, 16)
    left[..., 8:] = 0
    made = torch.zeros(len(prompts), world.SIZE, world.SIZE, 3)
    for side, regions in ((0, (left, 1 - left)), (2, (1 - left, left))):
        rows = (wanted[:, world.PLACE] == side).nonzero().flatten().tolist()
        concepts = tuple(c.replace(acting=Acting(region=region)) for c, region in zip(pair, regions))
        made[rows] = ours(pipe, concepts, [prompts[n] for n in rows], [seeds[n] for n in rows]).cpu()
    return made


def run(host: DiffusersHost, group: int) -> dict:
    """The rows of a group, and the cosines of its concepts under the covariance."""
    sitters = [Sitter(host, GROUP * group + k) for k in range(GROUP)]
    concepts = [sitter.tuned().replace(word=word) for sitter, word in zip(sitters, WORDS)]
    pipe, peers, rows = host.pipe, Peers(sitters), []
    who = torch.cat([sitter.who for sitter in sitters])

    def mark(k, of, how, applied, strength, scores):
        rows.append({"creature": GROUP * group + k, "of": of, "how": how, "applied": applied, "strength": strength}
                    | scores)

    for k, sitter in enumerate(sitters):
        wanted, mate = sitter.wanted.repeat(SEEDS, 1), who[[k ^ 1]]
        seeds, prompts = [1000 * sitter.k + n for n in range(len(wanted))], world.context_caption(wanted, WORDS[k])
        for strength, applied in ((0.75, 1), (1.0, 1), (1.0, 2), (1.0, 4), (1.0, 8)):
            those = (concepts[k], *(c for n, c in enumerate(concepts) if n != k))[:applied]
            made = ours(pipe, tuple(c.at(strength).kept_apart(True) for c in those), prompts, seeds)
            mark(k, "one", "apart", applied, strength, of_one(made, wanted, sitter.who, mate))
    for a in range(0, GROUP, 2):
        b, c = a + 1, (a + 2) % GROUP
        wanted = crowd(sitters[a]).repeat(SEEDS, 1)
        seeds = [1000 * sitters[a].k + 500 + n for n in range(len(wanted))]

        def said(first, second, wanted=wanted):
            return world.context_caption(wanted, first, second)

        def put(how, made, applied=2, strength=1.0, of="two", asked=who[[a, b]], a=a, wanted=wanted):
            mark(a, of, how, applied, strength, of_many(made, wanted, asked))

        prompts = said(WORDS[a], WORDS[b])
        for strength in STRENGTHS:
            for how in "joint", "apart":
                pair = tuple(concepts[k].at(strength).kept_apart(how == "apart") for k in (a, b))
                put(how, ours(pipe, pair, prompts, seeds), 2, strength)
        for applied in (4, 8):
            those = (a, b, *(k for k in range(GROUP) if k not in (a, b)))[:applied]
            all_of = tuple(concepts[k].at(1.0).kept_apart(True) for k in those)
            put("apart", ours(pipe, all_of, prompts, seeds), applied)
        put("halves", halves(pipe, (concepts[a].at(1.0), concepts[b].at(1.0)), wanted, prompts, seeds))
        put("class word", ours(pipe, (), said(SUPERCLASS, SUPERCLASS), seeds), 0, None)
        rich = [world.rich_subject(SUPERCLASS, who[[k]]) for k in (a, b)]
        put("rich words", ours(pipe, (), said(*rich), seeds), 0, None)
        put("lora", peers.stacked((a, b), prompts, seeds))
        put("custom-diffusion", peers.custom_diffusion(a, b, prompts, seeds))
        prompts = said(WORDS[a], f"{WORDS[b]} and a {WORDS[c]}")
        for how in "joint", "apart":
            three = tuple(concepts[k].at(1.0).kept_apart(how == "apart") for k in (a, b, c))
            put(how, ours(pipe, three, prompts, seeds), 3, 1.0, "three", who[[a, b, c]])
        put("lora", peers.stacked((a, b, c), prompts, seeds), 3, 1.0, "three", who[[a, b, c]])
    R = cosines(overlap(*(torch.stack([getattr(c, name) for c in concepts]) for name in ("direction", "target_input"))))
    return {"group": group, "rows": rows, "cosines": [round(R[m, n].item(), 5) for m in range(GROUP) for n in range(m)]}


def main():
    share_out(__doc__, "composition", GROUP, run, composition_table.gather)
