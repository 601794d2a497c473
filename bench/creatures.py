"""Personalise creatures that the miniature never saw, by every method, from one picture or five, and score what comes.

A *run* is one creature, one method, one learning rate, one seed and so many pictures: it learns for the most steps, and
stops at each of STEPS to draw the same prompts from the same noise (see examine.py). Its scores are kept in a file of
its own, so runs can be shared out (`--shard 0/2`) and go on where they were stopped; other weights of the miniature or
of the reader have a folder of their own. Learning rates are chosen on creatures of the dev split (`--search`), with as
many tried for each method; the scored ones are of the test split.
"""

import argparse
import hashlib
import json
import math
import subprocess
import time
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import torch

from ..core import domain as domains
from ..core.concept import Concept, dump
from ..core.encode import encode
from ..core.host_diffusers import DiffusersHost
from ..core.key_lock import TEMPERATURE
from ..core.tower import tokens_of
from ..core.tune import Lesson, Tuning, fit, schedule
from . import e4t, memory, peers, world
from . import reader as judge
from .examine import DEMO, DEVICE, GUIDANCE, SAMPLING, SUPERCLASS, WORD, Examiner, miniature, ours, tower

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "creatures.json"
STEPS = (0, 1, 5, 15, 50, 150, 400)
SEARCHED = 150  # steps of a run that searches, which is not scored after 0 and 1; after 0 all seeds are alike
RATES = {  # of the weights, or of the embedding where nothing else is learnt; of quick-tune its trust
    "perfusion": (0.03, 0.1, 0.3), "quick-tune": (0.03, 0.1, 0.3), "textual-inversion": (0.002, 0.006, 0.02),
    "lora": (0.001, 0.003, 0.01), "custom-diffusion": (0.0003, 0.001, 0.003), "dreambooth": (0.0001, 0.0003, 0.001),
    "e4t-full": (0.0001, 0.0003, 0.001), "e4t-tokens": (0.002, 0.006, 0.02),
}
RICH = "rich-words"  # nothing is learnt: the prompt names all that captions ever name of a creature
MOST = {"quick-tune": 50, "e4t-full": 15, "e4t-tokens": 15, RICH: 0}  # steps
EMBEDDING_RATE = 0.006  # beside weights; beside value outputs it is Tuning's own
OURS = {"perfusion": 0.5, "quick-tune": 1.0}  # the strength that each is scored at, the best on dev creatures
DIAL = (0.25, 0.5, 0.75, 1.0)  # all of these after so many steps, with the first seed:
DIALLED = {"perfusion": (150,), "quick-tune": (0, 5)}
DOMAINS = {"quick-tune": DEMO / "domains" / f"{SUPERCLASS}.safetensors", **e4t.FILES}  # what a method begins from


@cache
def runs_folder() -> Path:
    """Where the runs on these weights of the miniature and of the reader are kept."""
    read = hashlib.sha256()
    for part in "text_encoder", "unet", "vae":
        for path in sorted((DEMO / part).glob("*.safetensors")):
            read.update(path.read_bytes())
    read.update(judge.WEIGHTS.read_bytes())
    return ROOT / "build" / "bench" / read.hexdigest()[:12]


def run(pipe, method: str, rate: float, split: str, k: int, seed: int, pictures: int, last: int) -> dict:
    """One run's scores, rows by steps and strength; it ends early where what is learnt is no number any more."""
    host, examiner = DiffusersHost(pipe, SUPERCLASS, DEMO), Examiner(pipe, split, k)
    settings = Tuning(steps=last, seed=seed, resolution=world.SIZE, learning_rate=rate, trust=rate,
                      embedding_trust=rate / 10)
    images = world.render(SUPERCLASS, examiner.who.expand(pictures, -1), examiner.training[:pictures])[0]
    latents = host.latents(fit(images.movedim(1, -1), settings.resolution)).to(DEVICE)  # BCHW -> BHWC
    weight, generator = torch.ones_like(latents[:, :1]), torch.Generator().manual_seed(seed)
    samples, rows = schedule(settings, pictures, generator), []
    C_inv, covariance, _ = host.inverse_covariance()
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    spent, peak, loss = 0.0, memory.Peak(DEVICE), 0.0

    def mark(step):
        facts = {"steps": step, "seconds": round(spent, 3), "peak_mb": peak.megabytes}
        if method == RICH:
            draw = partial(ours, pipe, ())
            words = world.rich_subject(SUPERCLASS, examiner.who)
            rows.append(facts | {"strength": None, "bytes": 0} | examiner.scores(draw, words))
            return
        if method not in OURS:
            draw = partial(learner.draw, sampling=SAMPLING, guidance=GUIDANCE)
            rows.append(facts | {"strength": None, "bytes": learner.bytes} | examiner.scores(draw))
            return
        concept = Concept(base=host.base, prediction=host.prediction, superclass=SUPERCLASS, word=WORD,
                          covariance=covariance, **learner.learnt())
        dial = DIAL if step in DIALLED[method] and not seed else ()
        for strength in (OURS[method], *(other for other in dial if other != OURS[method])):
            draw = partial(ours, pipe, (gated(concept, strength),))
            rows.append(facts | {"strength": strength, "bytes": len(dump(concept))} | examiner.scores(draw))

    with host.training(latents[:1]), ExitStack() as undo:
        if method in OURS:
            start = encoded(host, images, latents) if method == "quick-tune" else None
            embedding = start.embedding if start else host.embedding(SUPERCLASS)
            learner = Lesson(host, SUPERCLASS, WORD, embedding, C_inv, settings, start)
        elif method != RICH:
            start = e4t.started(method, host, images) if method in e4t.KINDS else (host.embedding(SUPERCLASS), {})
            learner = undo.enter_context(peers.learning(method, host, WORD, rate, EMBEDDING_RATE, settings.templates,
                                                        *start))
        for step in range(last + 1):
            if not math.isfinite(loss):
                break
            if step in STEPS and (step > 1 if split == "dev" else step or not seed):
                mark(step)
            if step < last:
                begun = clock()
                with peak:
                    loss = learner.step(latents, weight, samples[step], generator)
                spent += clock() - begun
    return {"method": method, "rate": rate, "split": split, "creature": k, "seed": seed, "pictures": pictures,
            "last": last, "rows": rows, "commit": commit(), "domain": domain_of(method)}


def gated(concept: Concept, strength: float) -> Concept:
    """The concept at one of the marks of the dial as it was when these rows were measured: by its gate's bias alone."""
    return concept.raw(0.60 - 0.30 * strength, TEMPERATURE)


@cache
def domain(method):
    """What a method begins from, None where that is the superclass word."""
    return domains.load(DOMAINS[method]) if method in DOMAINS and DOMAINS[method].exists() else None


def domain_of(method: str) -> str | None:
    """The hash of the domain that a method begins from."""
    return domain(method) and domain(method).hash


def encoded(host, images, latents) -> Concept:
    """What our domain makes of pictures (m, 3, H, W), before any step."""
    ours = domain("quick-tune")
    seen = tokens_of(tower(), images.movedim(1, -1), ours.encoder.read)  # BCHW -> BHWC
    return encode(host, ours, seen, latents, SUPERCLASS, WORD)


def runs(arguments):
    """Every run that is asked for, as arguments of `run` without the pipeline."""
    split, first, count = ("dev", 0, arguments.search) if arguments.search else ("test", arguments.first, arguments.n)
    for k in range(first, first + count):
        for seed in range(1 if arguments.search else arguments.seeds):
            for method in arguments.methods:
                for rate in RATES[method] if arguments.search else (chosen()[method],):
                    last = SEARCHED if arguments.search else arguments.steps
                    yield method, rate, split, k, seed, arguments.pictures, min(last, MOST.get(method, last))


def share(every, shard: str):
    """Those of the runs that are a process's own: "0/2" is the first of two. A creature's runs stay together."""
    k, shards = map(int, shard.split("/"))
    return [one for one in every if one[3] % shards == k]


def kept(split: str):
    """The runs of a split that are done, on these weights and with this domain."""
    done = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(runs_folder().glob(f"{split}-*.json"))]
    return [one for one in done if one.get("domain") == domain_of(one["method"])]


@cache
def best() -> dict[str, tuple[float, int]]:
    """Every method's learning rate and steps with the highest identity + alignment on dev creatures, of those creatures
    on which all of its rates were tried. Step 0, which is alike for all, does not count."""
    scores, found = {}, {}
    for one in kept("dev"):
        for row in one["rows"]:
            if row["steps"] and row["strength"] == OURS.get(one["method"]):
                point = scores.setdefault(one["method"], {}).setdefault((one["rate"], row["steps"]), {})
                sound = row["identity"] is not None
                point[one["creature"]] = row["identity"] + row["alignment"] if sound else -1
    for method, of in scores.items():
        tried = set.intersection(*map(set, of.values())) if {rate for rate, _ in of} == set(RATES[method]) else ()
        if tried:
            found[method] = max(of, key=lambda point: sum(of[point][k] for k in tried))
    return found


def chosen() -> dict[str, float]:
    """Every method's learning rate: the best on dev creatures, else that of the results file, else the middle one."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    known = {row["method"]: row["learning_rate"] for row in rows}
    return {method: best()[method][0] if method in best() else known.get(method, rates[1])
            for method, rates in RATES.items()} | {RICH: 0}


def commit() -> str | None:
    """The commit of the code that runs, with a + where it was changed since; None where that is not known."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "core", "bench/*.py")) or None
    except OSError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", type=int, default=0, help="try all learning rates on so many dev creatures")
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=[*RATES, RICH])
    parser.add_argument("--first", type=int, default=0, help="the first of the test creatures")
    parser.add_argument("--n", type=int, default=32, help="how many of them")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS[-1])
    parser.add_argument("--shard", default="0/1", help="this process's share: 0/2 is the first of two")
    arguments = parser.parse_args()
    if not arguments.shard.endswith("/1"):
        torch.set_num_threads(1)
    runs_folder().mkdir(parents=True, exist_ok=True)
    pipe = miniature()
    for one in share(runs(arguments), arguments.shard):
        method, rate, split, k, seed, pictures, last = one
        name = f"{split}-{k:03}-{method}-{rate}-s{seed}-p{pictures}"
        name += f"-{domain_of(method)[:8]}" if domain_of(method) else ""
        path = runs_folder() / f"{name}-{last}.json"
        if not any(int(kept.stem.rpartition("-")[2]) >= last for kept in runs_folder().glob(f"{name}-*.json")):
            done = run(pipe, *one)
            path.with_suffix(".part").write_text(json.dumps(done, allow_nan=False), encoding="utf-8")
            path.with_suffix(".part").replace(path)
            row = done["rows"][-1]
            print(path.stem, {name: row[name] for name in ("steps", "identity", "top1", "alignment")}, flush=True)
