"""`python -m bench composition-speed`: what several concepts cost while a picture is made, as bench/speed.py measures.

Full-size SD1.5 of random weights in ComfyUI: one, two, four and eight concepts applied, one or two of them named. Where
two are kept apart the first step of a run is made twice, so there whole runs of STEPS take turns; else single steps do.
"""

import argparse

import comfy.sample
import torch

from ..headless.comfy import ROOT
from . import composition_table
from .speed import FOLDER, PROMPT, Bench, in_turn, row

STEPS = 20
KINDS = "cat", "dog", "bear", "horse", "bird", "fish", "car", "tree"
WORDS = [f"<{kind}y>" for kind in KINDS]


def loop(bench, model, clip, words, samples: int, steps: int):
    """A loop that draws guided samples of so many steps."""
    noise = comfy.sample.prepare_noise(latent := torch.zeros(1, 4, bench.size // 8, bench.size // 8), 0)
    conds = bench.encode(clip, PROMPT.format(*words)), bench.encode(clip, "blurry")
    return lambda done: [done(comfy.sample.sample(model, noise, steps, 6.0, "euler", "normal", *conds, latent,
                                                  disable_pbar=True)) for _ in range(samples)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="pairs of steps; a third as many of runs")
    n = parser.parse_args().runs
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "captions.txt").write_text(PROMPT.replace(" ", "\n"), encoding="utf-8")  # any will do here
    times = []
    with torch.inference_mode():
        from ..core.apply import apply

        bench = Bench("sd1", ROOT / "build" / "sd1-random.safetensors", 256)
        concepts = [bench.concept(*pair) for pair in zip(WORDS, KINDS)]
        for applied in (1, 2, 4, 8):
            for named, apart, samples, steps in ((1, True, n, 1), (2, False, n, 1), (2, True, n // 3, STEPS)):
                if named > applied:
                    continue
                model, clip = bench.model, bench.clip
                for concept in concepts[:applied]:
                    model, clip = apply(model, clip, concept.kept_apart(apart))
                words = [*WORDS[:named], *KINDS[named:3]]
                name = f"{applied} applied, {named} named" + (f", {'kept apart' if apart else 'joint'}" * (named > 1))
                times.append(row(name, in_turn(loop(bench, model, clip, words, samples + 1, steps),
                                               loop(bench, bench.model, bench.clip, KINDS[:3], samples + 1, steps))))
    composition_table.gather(times)
