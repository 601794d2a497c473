"""The results file, its table and its Pareto picture, from the runs that `bench creatures` left in build/bench.

A row is a point: method, pictures, steps, strength. Its figures are means over creatures of the means over seeds; `sd`
is over creatures and `se` that of their mean; seconds are of CPU time, or of the clock where a GPU runs. "paired" holds
differences on the creatures that both points had: at equal steps, and between each method's best steps, which are those
with the highest identity + alignment on dev creatures. "n, level" holds identity after n steps of both where our dial
gives the other's mean alignment: between the two nearest strengths, or at the nearest end.
"""

import argparse
import json
import math
import platform
import statistics
from collections import defaultdict

import torch

from . import creatures, metrics, quick
from . import reader as judge
from .creatures import DEVICE, OURS, RATES, RESULTS, RICH, STEPS
from .examine import SUPERCLASS

PICTURE, TABLE = RESULTS.with_suffix(".png"), RESULTS.with_suffix(".md")
MEANS = ("identity", "top1", "colour", "shape", "pattern", "leak", "peak_mb", "alignment", "drift", "diversity",
         "seconds", "bytes")
COMPARED = "identity", "alignment"
BOUNDED = "identity", "colour", "shape", "pattern", "top1", "alignment", "leak"


def mean_se(values):
    """Mean, standard deviation and standard error of the mean; the latter two None for one value."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return round(statistics.fmean(values), 5), sd and round(sd, 5), sd and round(sd / math.sqrt(len(values)), 5)


def points(runs):
    """{(method, pictures, steps, strength): {(creature, seed): row}} of runs, and the learning rate of each method."""
    found, rates = defaultdict(dict), {}
    for one in runs:
        rates[one["method"]] = one["rate"]
        for row in one["rows"]:
            found[one["method"], one["pictures"], row["steps"], row["strength"]][one["creature"], one["seed"]] = row
    return found, rates


def by_creature(values):
    """{(creature, seed): value} as means over seeds, {creature: value}; what is unknown is left out."""
    each = defaultdict(list)
    for (creature, _), value in values.items():
        if value is not None:
            each[creature].append(value)
    return {creature: statistics.fmean(of) for creature, of in each.items()}


def row(key, of, rate):
    """A point's figures."""
    method, pictures, steps, strength = key
    found = {"method": method, "pictures": pictures, "steps": steps, "strength": strength,
             "n": len({creature for creature, _ in of}), "seeds": len({seed for _, seed in of}), "learning_rate": rate}
    for name in MEANS:
        each = by_creature({at: row[name] for at, row in of.items()})
        mean, sd, se = mean_se(each.values()) if each else (None, None, None)
        found[name] = int(mean) if name == "bytes" else mean
        if name in COMPARED:
            found |= {f"{name}_sd": sd} | ({"identity_se": se} if name == "identity" else {})
    return found


def paired(a, b, of_a, of_b, steps):
    """The differences a − b of two points, by metric; none where they had nothing in common."""
    for metric in COMPARED:
        ours, theirs = (by_creature({at: row[metric] for at, row in of.items()}) for of in (of_a, of_b))
        each = [ours[creature] - theirs[creature] for creature in ours.keys() & theirs.keys()]
        if each:
            mean, _, se = mean_se(each)
            yield {"a": a, "b": b, "steps": steps, "metric": metric, "mean": mean, "se": se, "n": len(each)}


def level(method, peer, dial, other, steps, by="alignment", of_what="identity"):
    """The difference in identity between a dial, {strength: rows}, and another point, at the latter's alignment; or the
    other way round."""
    def each(of, metric):
        return by_creature({at: row[metric] for at, row in of.items()})

    if not dial or not other:
        return
    at = {statistics.fmean(each(of, by).values()): each(of, of_what) for of in dial.values()}
    wanted, theirs = statistics.fmean(each(other, by).values()), each(other, of_what)
    low = max((a for a in at if a <= wanted), default=min(at))
    high = min((a for a in at if a > wanted), default=max(at))
    share = (wanted - low) / (high - low) if low < wanted < high else 0.0
    lead = [(1 - share) * at[low][k] + share * at[high][k] - theirs[k] for k in at[low].keys() & theirs.keys()]
    mean, _, se = mean_se(lead)
    yield {"a": method, "b": peer, "steps": f"{steps}, level", "metric": of_what, "mean": mean, "se": se,
           "n": len(lead)}


def results():
    """What the results file holds. Raises ValueError where a method's runs are of more than one commit."""
    runs = {}
    for one in sorted(creatures.kept("test"), key=lambda one: one["last"]):  # a longer run takes a shorter one's place
        if one["creature"] < quick.FIRST and one["rate"] == creatures.chosen()[one["method"]]:
            runs[one["method"], one["creature"], one["seed"], one["pictures"]] = one
    runs = list(runs.values())
    commits = {}
    for one in runs:
        if commits.setdefault(one["method"], one["commit"]) != one["commit"]:
            raise ValueError(f"A method's rows are of one commit, and the runs of {one['method']} are of more. Run "
                             f"`bench all`, or remove the runs of the others from {creatures.runs_folder()}.")
    found, rates = points(runs)
    order = sorted(found, key=lambda key: ([*RATES, RICH].index(key[0]), key[1], key[3] or 0, key[2]))
    pairs, best = [], {method: steps for method, (_, steps) in creatures.best().items()}

    def point(method, steps):
        return found.get((method, 1, steps, OURS.get(method)), {})

    peers = [method for method in RATES if method not in OURS]
    for a, b in [("perfusion", "quick-tune"), *((ours, peer) for ours in OURS for peer in peers)]:
        pairs += paired(a, b, point(a, best.get(a)), point(b, best.get(b)), "best")
        for steps in STEPS:
            pairs += paired(a, b, point(a, steps), point(b, steps), steps)
    for steps in STEPS:  # after few steps, against what another reaches at its best, and against words
        pairs += [pair for method in RATES if method != "quick-tune" for pair in
                  paired("quick-tune", method, point("quick-tune", steps), point(method, best.get(method)),
                         f"{steps}, best")]
        for method in (RICH, "quick-tune") if steps else (RICH,):
            pairs += paired("quick-tune", method, point("quick-tune", steps), point(method, 0), f"{steps}, 0")
    for method, marks in creatures.DIALLED.items():
        for steps in marks:
            dial = {key[3]: of for key, of in found.items() if key[:3] == (method, 1, steps)}
            for peer in peers:
                pairs += level(method, peer, dial, point(peer, steps), steps)
                pairs += level(method, peer, dial, point(peer, best.get(peer)), f"{steps}, best")
    bounds, held = {}, metrics.held_out(SUPERCLASS, seed=1)
    for name, bound in (("ceiling", metrics.ceiling), ("floor", metrics.floor)):
        scores = bound(judge.load(), SUPERCLASS, held)
        bounds[name] = {key: round(scores[key].mean().item(), 5) for key in BOUNDED}
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"a core of {platform.machine()}"
    return {"commit": commits, "machine": f"{machine}, torch {torch.__version__}",
            "seeds": sorted({one["seed"] for one in runs}), **bounds, "best_steps": best,
            "rows": [row(key, found[key], rates[key[0]]) for key in order], "paired": pairs}


def table(found):
    """The rows as Markdown."""
    columns = ("method", "pictures", "steps", "strength", "n", "seeds", "identity", "identity_se", "colour", "shape",
               "pattern", "top1", "alignment", "leak", "drift", "diversity", "seconds", "peak_mb", "bytes")

    def cell(value):
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) and value < 100 else f"{value:.0f}" \
            if isinstance(value, (int, float)) else f"{value}"

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name in ("ceiling", "floor"):
        lines.append("| " + " | ".join([f"*{name}*", *(cell(found[name].get(c)) for c in columns[1:])]) + " |")
    lines += ["| " + " | ".join(cell(row[name]) for name in columns) + " |" for row in found["rows"]]
    lines += ["", f"{len(found['paired'])} comparisons; below 4 standard errors nothing is to be read into one.", "",
              "| a | b | metric | steps | a − b | ± | n |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {p['a']} | {p['b']} | {p['metric']} | {p['steps']} | {p['mean']:+.3f} | {cell(p['se'])} | {p['n']} |"
              for p in found["paired"]]
    return "\n".join(lines) + "\n"


def draw(found):
    """Identity over alignment, a line a method through its steps; further right and further up is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    rows = [row for row in found["rows"] if row["pictures"] == 1 and row["identity"] is not None]
    for method in (*RATES, RICH):
        at = [r for r in rows if r["method"] == method and r["strength"] == OURS.get(method)]
        if at:
            axes.errorbar([r["alignment"] for r in at], [r["identity"] for r in at],
                          yerr=[r["identity_se"] or 0 for r in at], marker="o", label=method, capsize=2)
            for r in at:
                axes.annotate(r["steps"], (r["alignment"], r["identity"]), fontsize=7, xytext=(3, 3),
                              textcoords="offset points")
    for r in [r for r in rows if r["strength"] != OURS.get(r["method"])]:
        axes.plot(r["alignment"], r["identity"], "x", color=f"C{list(RATES).index(r['method'])}", alpha=0.5)
    axes.axhline(found["ceiling"]["identity"], color="grey", linestyle=":", label="true pictures")
    axes.set(xlabel="alignment: share of the context drawn as asked", ylabel="identity of the one creature")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="gather the runs anew, else draw the file as it is")
    if parser.parse_args().again:
        RESULTS.write_text(json.dumps(results(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    TABLE.write_text(table(found), encoding="utf-8")
    draw(found)
    print(table(found))
