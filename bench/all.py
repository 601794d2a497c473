"""`make bench`: the whole of it, one process a core. What was done already is not done again."""

import argparse
import os
import subprocess
import sys

from . import e4t
from .creatures import DEVICE, OURS, RATES, RICH, ROOT
from .make_world import cores

# Creatures: for learning rates; scored. Without a GPU few of them go on to the last of STEPS, the others end at SHORT,
# and the peers have half of the creatures and one seed.
SEARCHED, SCORED, LONG, SHORT = 4, 32, 8, 150


def shared(*arguments, command="creatures"):
    """Run a command of the bench with these arguments in as many processes as there are cores, or in one on a GPU."""
    shards = 1 if DEVICE == "cuda" else cores()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if shards > 1 else None
    each = [subprocess.Popen([sys.executable, "-m", "bench", command, *map(str, arguments), "--shard",
                              f"{k}/{shards}"], cwd=ROOT, env=environment) for k in range(shards)]
    if any([process.wait() for process in each]):  # the list waits for all of them
        raise SystemExit("A shard failed; see above. Run it again to go on.")


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    fast = DEVICE == "cuda"
    peers = [method for method in RATES if method not in (*OURS, *e4t.KINDS)]
    if not all(path.exists() for path in e4t.FILES.values()):
        subprocess.run([sys.executable, "-m", "bench", "e4t"], cwd=ROOT, check=True)
    shared("--search", SEARCHED)
    if fast:
        shared("--methods", *RATES, RICH, "--n", SCORED, "--seeds", 2)
        shared("--n", SCORED, "--seeds", 2, "--pictures", 5)
    else:
        shared("--n", LONG, "--seeds", 1)
        shared("--methods", *OURS, RICH, "--n", SCORED, "--seeds", 2, "--steps", SHORT)
        shared("--methods", *e4t.KINDS, "--n", SCORED, "--seeds", 1, "--steps", SHORT)
        shared("--methods", *peers, "--n", SCORED // 2, "--seeds", 1, "--steps", SHORT)
        shared("--n", LONG, "--seeds", 1, "--pictures", 5, "--steps", SHORT)
    # what five steps add to what was encoded is small, and wants as many creatures again
    shared("--methods", "quick-tune", "--first", SCORED, "--n", SCORED, "--seeds", 1, "--steps", 5)
    shared("--n", SCORED, command="dial")
    shared("--n", SCORED, command="composition")
    for last in (["table", "--again"], ["dial", "--again"], ["composition", "--again"], ["far"], ["styles"]):
        subprocess.run([sys.executable, "-m", "bench", *last], cwd=ROOT, check=True)
