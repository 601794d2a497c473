"""`python -m bench help`: the pictures of the help pages, of the demo model and what it makes of pictures.

    demo_model.jpg       what the demo model draws
    demo_pictures.jpg    the pictures that come with it
    encode.jpg           one of them, and what a domain makes of it at once in three prompts
    domain.jpg           what the domain makes of each
    dial.jpg             one prompt, from strength 0 to 1

Those of help_server.py need ComfyUI, those of help_screens.py a browser too.
"""

import argparse
import importlib
import io
import tempfile
from pathlib import Path

import torch
from PIL import Image

from ..core.file import write
from ..headless import demo, pictures
from ..headless.comfy import ROOT
from ..headless.demo import concept_of, domains, host_diffusers, open_tower
from ..headless.learn import DEMO
from ..tests.served import serving

FOLDER, LARGEST = ROOT / "web" / "docs", 60 * 1024
KINDS = "drawn", "run", "shown"
PLAIN = ("a flat drawing of a creature in the snow", "a clay model of a house at the beach",
         "an ink drawing of a flower on a stage", "a pastel drawing of a creature holding a balloon at night",
         "a flat drawing of a house in the snow", "a clay model of a flower at the beach")

PLACES = "… in the snow, at the beach, on a stage", "… at night, in the snow, at the beach"


def put(name: str, sheet: Image.Image):
    """Write a sheet as a JPEG of 60 KB at the most, whole or not at all, and say so."""
    for quality in 88, 80, 70, 60:
        data = io.BytesIO()
        sheet.save(data, "JPEG", quality=quality)
        if data.tell() <= LARGEST:
            break
    print(write(FOLDER / f"{name}.jpg", data.getvalue()), f"{data.tell() / 1024:.0f} KB", flush=True)


def made():
    """Each picture's name and the picture."""
    pipe, tower = host_diffusers.load(DEMO), open_tower(DEMO / "vision")
    host = host_diffusers.DiffusersHost(pipe, demo.SUPERCLASS, DEMO)
    domain = domains.load(DEMO / "domains" / f"{demo.SUPERCLASS}.safetensors")
    photos = {path.stem: pictures.read(path) for path in sorted((DEMO / "pictures").glob("*.png"))}
    concepts = {name: concept_of(host, domain, tower, photo, demo.WORD) for name, photo in photos.items()}

    def draw(prompt, seed, name="mimi", strength=1.0):
        return host_diffusers.pictures(pipe, [prompt.format(demo.WORD)], [concepts[name].at(strength)], seeds=[seed])

    plain = [host_diffusers.pictures(pipe, [prompt], seeds=[k]) for k, prompt in enumerate(PLAIN)]
    yield "demo_model", pictures.sheet([plain[:3], plain[3:]], ["a creature …", "a house …", "a flower …"], PLACES)
    yield "demo_pictures", pictures.sheet([list(photos.values())], list(photos), [""], side=128)
    first = [draw(prompt, k) for k, prompt in enumerate(demo.PROMPTS[:3])]
    above = ["the picture", *(f"… {prompt.partition(' of a {} ')[2]}" for prompt in demo.PROMPTS[:3])]
    yield "encode", pictures.sheet([[photos["mimi"], *first]], above, [""])
    rows = [list(photos.values()), [draw(demo.PROMPTS[1], 1, name) for name in photos]]
    yield "domain", pictures.sheet(rows, list(photos), ["six pictures", demo.PROMPTS[1].format(demo.WORD)], side=128)
    strengths = demo.STRENGTHS
    yield "dial", pictures.sheet([[draw(demo.PROMPTS[1], 1, strength=s) for s in strengths]],
                                 [f"{s:g}" for s in strengths], [demo.PROMPTS[1].format(demo.WORD)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS],
                        help="drawn by the model, run by ComfyUI, or shown in a browser; all, when none is given")
    kinds = parser.parse_args().kinds or KINDS
    torch.set_num_threads(1)
    if "drawn" in kinds:
        for name, sheet in made():
            put(name, sheet)
    for kind, module in ("run", "help_server"), ("shown", "help_screens"):
        if kind in kinds:
            with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
                for name, sheet in importlib.import_module(f"{__package__}.{module}").made(server):
                    put(name, sheet)
