"""What `bench dial` measured, as bench/results/dial.json, its table and its picture.

The front is identity over alignment as the strength turns. A peer's point is inside or on it where our identity, read
at its alignment between two strengths, or at the nearest end, is no lower: above −.02 and above −2 standard errors of
the paired difference; else it is named. The slope is that of mean identity over the slider.
"""

import json
import statistics

from . import creatures, quick
from .creatures import RESULTS, runs_folder
from .dial import GLOBAL, MARKS, PROMPTS, SEEDS
from .table import by_creature, level, mean_se, points, row

FILE = RESULTS.with_name("dial.json")
OURS = "quick-tune"
UNASKED = ("peak_mb", "drift", "diversity", "bytes")  # of a row of `bench creatures`


def kept() -> list[dict]:
    """The creatures' runs, in the form that `table.points` takes."""
    paths = sorted(runs_folder().glob(f"dial-*-{creatures.domain_of('quick-tune')[:8]}.json"))
    done = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rate, empty = creatures.chosen(), dict.fromkeys(UNASKED) | {"bytes": 0}
    return [{"method": row["method"], "rate": rate[row["method"].split(",")[0].split()[0]], "pictures": 1, "seed": 0,
             "creature": one["creature"], "commit": one["commit"], "rows": [empty | row]}
            for one in done for row in one["rows"] if one["creature"] < quick.FIRST]


def slope(dial) -> dict[str, float]:
    """What a dial {strength: {(creature, seed): row}} does to identity and to alignment."""
    marks, found = sorted(dial), {}
    for name in ("identity", "alignment"):
        each = [by_creature({at: r[name] for at, r in dial[mark].items()}) for mark in marks]
        mean = [statistics.fmean(of.values()) for of in each]
        steps = [b - a for a, b in zip(mean, mean[1:])]
        alone = [statistics.correlation(marks, [of[k] for of in each]) for k in each[0]]
        m, _, se = mean_se(alone)
        found[name] = {"correlation": round(statistics.correlation(marks, mean), 4), "of_each_creature": m, "se": se,
                       "range": round(mean[-1] - mean[0], 4),
                       "largest_step": round(max(map(abs, steps)) / abs(mean[-1] - mean[0]), 4),
                       "first_step": round(steps[0] / (mean[-1] - mean[0]), 4),
                       "last_step": round(steps[-1] / (mean[-1] - mean[0]), 4)}
    return found


def results() -> dict:
    """What the file holds."""
    runs = kept()
    found, rates = points(runs)
    dial = {key[3]: of for key, of in found.items() if key[0] == OURS}
    order = sorted(found, key=lambda key: (key[0] != OURS, key[0], key[2], key[3]))
    front = []
    for key in order:
        if key[0] in (OURS, GLOBAL):
            continue
        for pair in level(OURS, f"{key[0]}, {key[2]} steps, strength {key[3]:g}", dial, found[key], "level"):
            held = pair["mean"] > -0.02 and pair["mean"] > -2 * pair["se"]
            front.append(pair | {"inside_or_on": held})
    locked = {key[3]: of for key, of in found.items() if key[0] == GLOBAL}
    lock = [pair | {"strength": mark} for mark, of in sorted(locked.items())
            for pair in level(OURS, f"{GLOBAL}, strength {mark:g}", dial, of, "level", "identity", "alignment")]
    commits = sorted({run["commit"] for run in runs})
    return {"commit": commits, "prompts": PROMPTS, "seeds": SEEDS, "slider": slope(dial), "front": front,
            "global_lock": lock,
            "rows": [{name: value for name, value in row(key, found[key], rates[key[0]]).items()
                      if name not in (*UNASKED, "seeds")} for key in order]}


def cell(value) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value}"


def table(found) -> str:
    """The figures as Markdown."""
    columns = ("method", "steps", "strength", "n", "identity", "identity_se", "colour", "shape", "pattern", "top1",
               "alignment", "leak")
    lines = [f"{found['rows'][0]['n']} test creatures, {found['prompts']} prompts and {found['seeds']} seeds each.", "",
             "| the slider of one tuned concept | correlation | of each creature | range | largest step of .05 | first "
             "| last |", "|---|---|---|---|---|---|---|"]
    for name, s in found["slider"].items():
        lines.append(f"| {name} | {s['correlation']:.3f} | {s['of_each_creature']:.3f} ± {s['se']:.3f} | "
                     f"{s['range']:+.3f} | {s['largest_step']:.3f} | {s['first_step']:.3f} | {s['last_step']:.3f} |")
    lines += ["", "| our identity at the alignment of | a − b | ± | n | no lower |", "|---|---|---|---|---|"]
    lines += [f"| {p['b']} | {p['mean']:+.3f} | {p['se']:.3f} | {p['n']} | {'yes' if p['inside_or_on'] else 'NO'} |"
              for p in found["front"]]
    lines += ["", "| alignment of the local lock at the identity of | a − b | ± | n |", "|---|---|---|---|"]
    lines += [f"| {p['b']} | {p['mean']:+.3f} | {p['se']:.3f} | {p['n']} |" for p in found["global_lock"]]
    lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(r[name]) for name in columns) + " |" for r in found["rows"]]
    return "\n".join(lines) + "\n"


def draw(found):
    """The front: likeness up, obedience to the right; our dial is a line, its peers are points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.6))
    ours = sorted((r for r in found["rows"] if r["method"] == OURS), key=lambda r: r["strength"])
    axes.plot([r["alignment"] for r in ours], [r["identity"] for r in ours], "-o", color="#f0a030", markersize=3,
              label="our dial, 0 to 1, one tuned concept")
    for r in ours:
        if r["strength"] in MARKS[::5]:
            axes.annotate(f"{r['strength']:g}", (r["alignment"], r["identity"]), fontsize=8, xytext=(5, 3),
                          textcoords="offset points")
    names = sorted({r["method"] for r in found["rows"]} - {OURS, GLOBAL})
    for name, marker in zip(names, "sD^v"):
        at = [r for r in found["rows"] if r["method"] == name]
        axes.errorbar([r["alignment"] for r in at], [r["identity"] for r in at], yerr=[r["identity_se"] for r in at],
                      fmt=marker, capsize=2, markersize=4, label=name)
        for r in at:
            text = f"{r['strength']:g}" if len({o["strength"] for o in at}) > 1 else f"{r['steps']}"
            axes.annotate(text, (r["alignment"], r["identity"]), fontsize=7, xytext=(4, -8), textcoords="offset points")
    axes.set(xlabel="obedience: share of the prompt's context drawn as asked", ylabel="likeness: identity")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FILE.with_suffix(".png"), dpi=120)


def gather():
    """Write all three, and print the table."""
    FILE.write_text(json.dumps(results(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    found = json.loads(FILE.read_text(encoding="utf-8"))
    FILE.with_suffix(".md").write_text(table(found), encoding="utf-8")
    draw(found)
    print(table(found))
