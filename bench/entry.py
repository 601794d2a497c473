"""May methods be judged on this miniature? It has to obey its captions and to be able to draw an identity at all.

Dev creatures in contexts unlike any training picture's, in five ways: drawn by the world (what no method can pass),
the same through the autoencoder (what this miniature cannot pass), by the miniature from all coarse words that captions
use, judged on the factors that they name, by the class word alone, and by the world with another creature.
"""

import argparse
import json
from pathlib import Path

import torch

from ..core import host_diffusers
from . import metrics, world
from . import reader as judge
from .examine import DEMO, GUIDANCE, SAMPLING, SUPERCLASS, miniature

ROOT = DEMO.parent
RESULTS = ROOT / "bench" / "results" / "entry.json"
COLUMNS = "identity", "colour", "shape", "pattern", "top1", "alignment"
WANTED = {"alignment": 0.93, "shape": 0.5, "top1": 0.5}  # of the rich words


@torch.no_grad()
def through(pipe, pictures):
    """Pictures (m, 3, H, W) in 0..1 as the autoencoder gives them back."""
    vae = pipe.vae  # which speaks -1..1
    return torch.cat([(vae.decoder(vae.encoder(2 * x - 1)) / 2 + 0.5).clamp(0, 1) for x in pictures.split(16)])


def drawn(pipe, captions):
    """Pictures (m, 3, H, W) of m captions, with seeds 0, 1, 2 …"""
    made = [host_diffusers.pictures(pipe, captions[k : k + 16], steps=SAMPLING, guidance=GUIDANCE,
                                    seeds=range(k, min(k + 16, len(captions)))) for k in range(0, len(captions), 16)]
    return torch.cat(made).movedim(-1, 1)  # BHWC -> BCHW


def examine(pipe):
    """{way: {score: mean}} and {way: pictures (n, 3, H, W)} of a gallery of n dev creatures."""
    held, n = metrics.held_out(SUPERCLASS, split="dev"), metrics.GALLERY
    who, wanted = held["identity"], held["wanted"]
    beside = (torch.full((n,), world.SUPERCLASSES.index("house")), held["second"])
    ways = {
        "world": held["pictures"], "through the autoencoder": through(pipe, held["pictures"]),
        "rich words": drawn(pipe, world.rich_caption(SUPERCLASS, who, wanted, beside)),
        "class word": drawn(pipe, world.context_caption(wanted, SUPERCLASS)),
        "another": held["others"],
    }
    named, rows = metrics.parts_factors_named(SUPERCLASS), {}
    for way, pictures in ways.items():
        read = judge.load().read(pictures)
        believed = read.of(SUPERCLASS, wanted)
        found = {"alignment": metrics.alignment(read, wanted, SUPERCLASS)}
        for prefix, factors in (("", named), ("all_", None)):
            found |= {prefix + name: score
                      for name, score in metrics.identity(SUPERCLASS, believed, who, factors).items()}
            found[prefix + "top1"] = metrics.top1(SUPERCLASS, believed, who, torch.arange(n), factors)
        found["guess_shape"] = metrics.identity(SUPERCLASS, believed, who, named, guess=True)["shape"]
        found["columns"] = metrics.right(read, wanted, SUPERCLASS).mean(0)
        rows[way] = {name: score.mean().item() if name != "columns" else
                     dict(zip(metrics.COLUMNS, score.tolist())) for name, score in found.items()}
    return rows, ways


def show(ways, path: Path, count=10):
    """A sheet of the first creatures, a row a way."""
    from torchvision.utils import make_grid, save_image

    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(make_grid(torch.cat([pictures[:count] for pictures in ways.values()]), count, 2), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), help="the miniature's folder (default demo)")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, ways = examine(miniature(arguments.model))
    print(f"{metrics.GALLERY} dev creatures, named factors".ljust(34), *(f"{name:>10}" for name in COLUMNS),
          "all factors")
    for way, row in rows.items():
        print(way.ljust(34), *(f"{row[name]:10.3f}" for name in COLUMNS),
              *(f"{name} {row[f'all_{name}']:.3f}" for name in COLUMNS[:-1]))
    print("rich words, columns:", {name: round(share, 3) for name, share in rows["rich words"]["columns"].items()})
    show(ways, ROOT / "build" / "entry.png")
    short = {name: goal for name, goal in WANTED.items() if rows["rich words"][name] < goal}
    print("passed" if not short else f"missed: {short}", "· sheet: build/entry.png")
    if arguments.keep:
        facts = {"n": metrics.GALLERY, "guidance": GUIDANCE, "sampling": SAMPLING, "rows": rows}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
