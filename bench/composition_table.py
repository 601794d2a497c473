"""What `bench composition` measured, as bench/results/composition.json and its table.

A row is a mean over creatures (of one) or pairs (of two, three), with the standard error of it. "share_of_single" is of
what our own concepts have alone at that strength, for the peers too, which were not drawn alone here. Sampling time is
of ComfyUI on full-size SD1.5 with random weights (`bench composition-speed`), runs with concepts and without taking
turns.
"""

import json
import statistics

from .creatures import RESULTS, domain_of, runs_folder
from .dial import PROMPTS, SEEDS
from .table import mean_se

FILE = RESULTS.with_name("composition.json")
KEY = ("of", "how", "applied", "strength")
SHOWN = ("present", "first", "second", "both", "anywhere", "identity", "other's", "alignment", "two")
SINGLE = ("one", "apart", 1, 1.0)


def results() -> dict:
    """What the file holds, but for times."""
    paths = sorted(runs_folder().glob(f"composition-*-{domain_of('quick-tune')[:8]}.json"))
    done = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows, angles = {}, sorted(angle for one in done for angle in one["cosines"])
    for one in done:
        for row in one["rows"]:
            rows.setdefault(tuple(row[name] for name in KEY), []).append(row)
    found = []
    for key, of in rows.items():
        scores = {name: mean_se([row[name] for row in of]) for name in SHOWN if name in of[0]}
        found.append(dict(zip(KEY, key)) | {"n": len(of)} | {name: mean for name, (mean, _, _) in scores.items()} | {
            f"{name}_se": se for name, (_, _, se) in scores.items() if name in ("present", "identity", "alignment")})
    alone = {(row["creature"], row["strength"]): row["present"] for row in rows[SINGLE] + rows[(*SINGLE[:3], 0.75)]}
    for row in found:
        if row["of"] == "two" and row["strength"]:
            of = rows[tuple(row[name] for name in KEY)]
            single = statistics.fmean(alone[r["creature"] + k, r["strength"]] for r in of for k in (0, 1))
            row["share_of_single"] = round(row["present"] / single, 4)
    return {"commit": sorted({one["commit"] for one in done}), "prompts": PROMPTS, "seeds": SEEDS, "rows": found,
            "cosines": {"pairs": len(angles), "median": statistics.median(angles), "largest": angles[-1],
                        "above_.99": sum(angle > 0.99 for angle in angles)}}


def table(found) -> str:
    """The figures as Markdown."""
    columns = (*KEY, "n", "share_of_single", *SHOWN)

    def cell(row, name):
        value, se = row.get(name), row.get(f"{name}_se")
        text = "" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value}"
        return text + (f" ± {se:.3f}" if se is not None else "")

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row, name) for name in columns) + " |" for row in found["rows"]]
    angles = found["cosines"]
    lines += ["", f"C⁻¹-cosine of two creatures after five steps, {angles['pairs']} pairs: median "
              f"{angles['median']:.3f}, largest {angles['largest']:.3f}, {angles['above_.99']} above .99."]
    if "times" in found:
        lines += ["", "| sampling time over that of the plain model | median | quartiles | runs |", "|---|---|---|---|"]
        lines += [f"| {t['name']} | {t['ratio']:.3f} | {t['low']:.3f}–{t['high']:.3f} | {t['runs']} |"
                  for t in found["times"]]
    return "\n".join(lines) + "\n"


def gather(times=None):
    """Write both, and print the table. Times are kept where no new ones are given."""
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    times = times or known.get("times")
    found = results() | ({"times": times} if times else {})
    FILE.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    FILE.with_suffix(".md").write_text(table(found), encoding="utf-8")
    print(table(found))
