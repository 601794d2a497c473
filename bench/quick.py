"""`make bench-quick SEED=n`: other held-out creatures by the seed, in ten minutes on two cores."""

import argparse
import statistics

from . import creatures, metrics
from . import reader as judge
from .all import shared
from .examine import SUPERCLASS

FIRST, CREATURES, STEPS = 1000, 4, 50
METHODS = "perfusion", "quick-tune", "textual-inversion", "dreambooth"
COLUMNS = "identity", "colour", "shape", "pattern", "top1", "alignment", "leak", "drift"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    first = FIRST + CREATURES * parser.parse_args().seed
    shared("--methods", *METHODS, "--first", first, "--n", CREATURES, "--seeds", 1, "--steps", STEPS)
    print(f"creatures {first} to {first + CREATURES - 1}".ljust(32), *(f"{name:>9}" for name in COLUMNS))
    for name, bound in (("true pictures", metrics.ceiling), ("another creature", metrics.floor)):
        scores = bound(judge.load(), SUPERCLASS, metrics.held_out(SUPERCLASS, seed=first))
        print(name.ljust(32), *(f"{scores[c].mean():9.3f}" for c in COLUMNS[:-1]))
    done = [one for one in creatures.kept("test") if 0 <= one["creature"] - first < CREATURES and one["last"] == STEPS
            and one["rate"] == creatures.chosen()[one["method"]]]
    for method in METHODS:
        for rows in zip(*(one["rows"] for one in done if one["method"] == method)):
            name = f"{method}, {rows[0]['steps']} steps" + (f", {rows[0]['strength']}" if rows[0]["strength"] else "")
            means = [statistics.fmean(row[c] for row in rows if row[c] is not None) for c in COLUMNS]
            print(name.ljust(32), *(f"{mean:9.3f}" for mean in means))
