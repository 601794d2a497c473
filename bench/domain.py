"""`python -m bench domain`: a domain of the creature world, trained by the pack's own command on a folder of pictures.

Each picture is of a training identity, alone, with captions beside it that say the whole context and nothing of who it
is: that is left to the encoder. Where it stopped, it goes on.
"""

import argparse
import shutil
import subprocess
import sys

import torch
from PIL import Image

from . import world
from .examine import DEMO, DEVICE, SUPERCLASS
from .make_world import ROOT, WORK, cores

SEED, PICTURES, WORDINGS, CHUNK = 3, 6000, 4, 200
TRAINED = WORK / f"{SUPERCLASS}.safetensors"
SETTINGS = {"steps": 5000, "batch": 32, "learning-rate": 2e-3, "every": 500, "precision": "bf16"}


def chunk(first):
    """CHUNK pictures (CHUNK, 3, H, W) in bytes from the first on, and the captions of each, with {} where it is."""
    generator = torch.Generator().manual_seed(SEED * 100_000 + first)
    context = world.contexts(CHUNK, generator, company="alone")
    who = world.identities(CHUNK, "train", SUPERCLASS, generator)
    pictures = (world.render(SUPERCLASS, who, context)[0] * 255).round().byte()
    said = [world.context_caption(context, "{}", generator=generator) for _ in range(WORDINGS)]
    return pictures, list(zip(*said))


def draw(folder, n=PICTURES, chunk=chunk):
    """Write n pictures, of whole chunks, with their captions, those that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, n, CHUNK):
        if (folder / f"{first + CHUNK - 1:05}.txt").exists():
            continue
        pictures, captions = chunk(first)
        for k in range(CHUNK):
            Image.fromarray(pictures[k].permute(1, 2, 0).numpy()).save(folder / f"{first + k:05}.png")
            (folder / f"{first + k:05}.txt").write_text("\n".join(captions[k]) + "\n", encoding="utf-8")


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    folder = WORK / f"domain-{SUPERCLASS}"
    draw(folder)
    # with --cpu accelerate starts one process, however many are asked for
    processes = ["--multi_gpu", "--num_processes", str(cores())] if DEVICE == "cpu" else ["--num_processes", "1"]
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *processes, "-m", "headless", "train-domain",
                    DEMO, folder, "--tower", DEMO / "vision", "--superclass", SUPERCLASS, "--out", TRAINED, *settings],
                   cwd=ROOT, check=True)
    (DEMO / "domains").mkdir(exist_ok=True)
    shutil.copy(TRAINED, DEMO / "domains" / TRAINED.name)
