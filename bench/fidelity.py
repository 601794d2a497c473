"""`python -m bench fidelity`: how well a fidelity curve (core/fidelity.py) and its knee agree with the truth.

Concepts are learnt of one picture of dev and of test creatures: encoded, and tuned from the class word for 50 steps and
for 200, which is too long. Each is drawn at STRENGTHS of the curve's own prompts and of TRUTH others. Of the former the
curve is taken, of the latter identity and alignment are read. Printed and kept in bench/results/fidelity.json:

    how far likeness goes with identity over the strengths of a concept, and obedience with alignment (correlations)
    identity + alignment at the strength that a rule chooses, less that at .75 and at 1 (paired)

The knee's rule and its KEPT were chosen on the dev creatures; the test creatures were looked at once. Between two
strengths the truth is interpolated. The best is chosen by the truth itself, so its gain is somewhat too large.
Letters: s strengths · p prompts.
"""

import argparse
import json
from functools import cache
from statistics import fmean

import numpy as np
import torch
from transformers import CLIPVisionModel

from ..core import fidelity
from ..core.concept import Concept
from ..core.fidelity import Curve, likeness, obedience
from ..core.host_diffusers import DiffusersHost
from ..core.tower import prepare
from ..core.tune import Lesson, Tuning, fit, schedule
from . import creatures, metrics, world
from . import reader as judge
from .creatures import encoded, runs_folder
from .examine import DEMO, SUPERCLASS, WORD, creature, miniature, ours
from .table import mean_se

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEARNT = (50, 200)  # steps from the class word: what is advised, and too many
TRUTH = 10  # prompts
SPLITS = {"dev": range(20, 28), "test": range(12)}
RESULTS = creatures.RESULTS.with_name("fidelity.json")


def shares(values):
    """Values as shares of their range."""
    v = np.array(values)
    return (v - v.min()) / max(v.max() - v.min(), 1e-9)


def highest(score) -> float:
    """The strength above 0 with the highest of scores (s)."""
    return STRENGTHS[1 + int(np.argmax(score[1:]))]


RULES = {  # from a curve, and from the truth (s) at its strengths
    "the best by the truth": lambda curve, truth: highest(truth),
    "always .5": lambda curve, truth: 0.5,
    "always .75": lambda curve, truth: 0.75,
    "always 1": lambda curve, truth: 1.0,
    "the knee": lambda curve, truth: curve.knee,
    "highest sum": lambda curve, truth: highest(np.add(curve.likeness, curve.obedience)),
    "highest sum of shares": lambda curve, truth: highest(shares(curve.likeness) + shares(curve.obedience)),
    "nine tenths of the likeness": lambda curve, truth: next(
        s for s, share in zip(STRENGTHS, shares(curve.likeness)) if share >= 0.9),
}


def concepts(host, images, seed: int) -> dict[str, Concept]:
    """What is learnt of a picture (1, 3, H, W), by how: from too little to too much."""
    settings = Tuning(steps=LEARNT[-1], seed=seed, resolution=world.SIZE)
    latents = host.latents(fit(images.movedim(1, -1), settings.resolution))  # BCHW -> BHWC
    C_inv, covariance, _ = host.inverse_covariance()
    generator, found = torch.Generator().manual_seed(seed), {"encoded": encoded(host, images, latents)}
    samples, weight = schedule(settings, 1, generator), torch.ones_like(latents[:, :1])
    with host.training(latents):
        lesson = Lesson(host, SUPERCLASS, WORD, host.embedding(SUPERCLASS), C_inv, settings, None)
        for step, sample in enumerate(samples, 1):
            lesson.step(latents, weight, sample, generator)
            if step in LEARNT:
                found[f"{step} steps"] = Concept(base=host.base, prediction=host.prediction, superclass=SUPERCLASS,
                                                 word=WORD, covariance=covariance, **lesson.learnt())
    return found


def drawn(host, split: str, k: int) -> dict:
    """All that is asked of the k-th creature of a split, drawn once and kept: pictures (s, p, 3, H, W) in bytes of each
    concept, first of the TRUTH prompts, whose contexts are `wanted`, then of the curve's own; and the `photo`."""
    path = runs_folder() / f"fidelity-{split}-{k:03}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    who, training, _ = creature(split, k)
    wanted = world.unlike(training[:1].expand(TRUTH, -1), torch.Generator().manual_seed(k))
    wanted[::2, world.COMPANY] = 0
    photo = world.render(SUPERCLASS, who, training[:1])[0]
    lines = [*world.context_caption(wanted, "{}"), *fidelity.PROMPTS]

    def draw(applied, word):
        prompts, seeds = [line.replace("{}", word) for line in lines], [1000 * k + n for n in range(len(lines))]
        made = ours(host.pipe, applied, prompts, seeds).movedim(-1, 1)  # BHWC -> BCHW
        return (made.clamp(0, 1) * 255).round().byte().cpu()

    plain = draw((), SUPERCLASS)
    made = {name: torch.stack([plain, *(draw((concept.at(s),), WORD) for s in STRENGTHS[1:])])
            for name, concept in concepts(host, photo, k).items()}
    kept = {"made": made, "who": who, "wanted": wanted, "photo": photo}
    torch.save(kept, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return kept


@cache
def vision() -> CLIPVisionModel:
    return CLIPVisionModel.from_pretrained(DEMO / "vision", torch_dtype=torch.float32).eval()


@torch.no_grad()
def answers(pictures):
    """What ComfyUI's CLIP_VISION of the demo answers to pictures (m, 3, H, W): vectors, and its tokens' means."""
    out = vision()(prepare(pictures.movedim(1, -1), vision().config.image_size), output_hidden_states=True)
    return out.pooler_output[:, : vision().config.projection_dim], out.hidden_states[-2].mean(1)


def measured(kept: dict) -> dict:
    """Of each concept: its curve, the class token's obedience, and identity and alignment (s) of the other prompts."""
    photos, found = answers(kept["photo"])[0], {}
    for name, made in kept["made"].items():
        made = made.float() / 255
        vectors, means = (torch.stack(part) for part in zip(*(answers(row[TRUTH:]) for row in made)))
        curve = Curve(STRENGTHS, tuple(likeness(vectors, photos).tolist()), tuple(obedience(means).tolist()), "",
                      fidelity.PROMPTS, 0)
        truth = {"identity": [], "alignment": []}
        for row in made:
            read = judge.load().read(row[:TRUTH])
            believed, who = read.of(SUPERCLASS, kept["wanted"]), kept["who"].expand(TRUTH, -1)
            truth["identity"].append(metrics.identity(SUPERCLASS, believed, who)["identity"].mean().item())
            truth["alignment"].append(metrics.alignment(read, kept["wanted"], SUPERCLASS).mean().item())
        found[name] = truth | {"curve": curve, "class token": obedience(vectors).tolist()}
    return found


def summary(every: list[dict]) -> dict:
    """Correlations, curves and rules over creatures' `measured`; a creature's concepts count as one. Where the truth is
    the same at all strengths there is nothing to go with, and no correlation."""
    kinds = list(every[0])

    def over(value):  # mean and standard error over creatures
        found = [[v for kind in kinds if (v := value(of[kind])) is not None] for of in every]
        return mean_se([fmean(values) for values in found if values])[::2]

    def along(x, y):
        return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else None

    def gain(rule, beside):
        def of(one):
            truth = np.add(one["identity"], one["alignment"])
            s = RULES[rule](one["curve"], truth)
            return float(np.interp(s, STRENGTHS, truth) - (np.interp(beside, STRENGTHS, truth) if beside else 0))

        return of

    return {
        "correlation": {
            "likeness with identity": over(lambda one: along(one["curve"].likeness, one["identity"])),
            "obedience with alignment": over(lambda one: along(one["curve"].obedience, one["alignment"])),
            "the class token's obedience with alignment": over(lambda one: along(one["class token"], one["alignment"])),
        },
        "no correlation": sum(not np.ptp(of[kind]["alignment"]) for of in every for kind in kinds),
        "curves": {kind: {name: [round(fmean(values), 4) for values in zip(*(part(of[kind]) for of in every))]
                          for name, part in PARTS.items()} for kind in kinds},
        "rules": {rule: {"score": over(gain(rule, None)), "over .75": over(gain(rule, 0.75)),
                         "over 1": over(gain(rule, 1.0)),
                         "strength": over(lambda one, rule=rule: RULES[rule](
                             one["curve"], np.add(one["identity"], one["alignment"]))),
                         "by concept": {kind: round(fmean(gain(rule, None)(of[kind]) for of in every), 4)
                                        for kind in kinds}} for rule in RULES},
    }


PARTS = {"identity": lambda one: one["identity"], "alignment": lambda one: one["alignment"],
         "likeness": lambda one: one["curve"].likeness, "obedience": lambda one: one["curve"].obedience}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dev", action="store_true", help="the dev creatures alone, without a file")
    dev = parser.parse_args().dev
    torch.set_num_threads(1)
    runs_folder().mkdir(parents=True, exist_ok=True)
    host, found = DiffusersHost(miniature(), SUPERCLASS, DEMO), {}
    for split, numbers in SPLITS.items():
        if split != "dev" and dev:
            break
        every = [measured(drawn(host, split, k)) for k in numbers]
        found[split] = {"creatures": len(every), "concepts of each": len(every[0])} | summary(every)
        show(split, found[split])
    if not dev:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def show(split: str, of: dict):
    """Print the figures of a split."""
    print(f"\n{split}: {of['creatures']} creatures, {of['concepts of each']} concepts of each")
    for name, (mean, se) in of["correlation"].items():
        print(f"  {name:44} {mean:.3f} ± {se:.3f}")
    print(f"  concepts whose alignment is the same at all strengths, left out of these: {of['no correlation']}")
    for kind, parts in of["curves"].items():
        for name, values in parts.items():
            print(f"  {kind:10} {name:10}", *(f"{value:7.3f}" for value in values))
    print(" " * 31, "score", "      over .75", "       over 1", "      strength", " ", *of["curves"], sep=" ")
    for rule, row in of["rules"].items():
        (score, _), (gain, se), (more, error), (s, spread) = (
            row[name] for name in ("score", "over .75", "over 1", "strength"))
        print(f"  {rule:28} {score:6.3f}  {gain:+.3f} ± {se:.3f}  {more:+.3f} ± {error:.3f}  {s:.2f} ± {spread:.2f}  ",
              *(f"{value:.3f}" for value in row["by concept"].values()))


if __name__ == "__main__":
    main()
