"""`python -m bench help`: the pictures of the help pages, of what the demo makes of one picture of a creature.

    encode.jpg    the picture, and what a domain makes of it at once in three prompts
    dial.jpg      one prompt, from strength 0 to 1
"""

import argparse
import io

import torch
from PIL import Image

from ..core.file import write
from ..headless import demo, pictures
from ..headless.comfy import ROOT
from ..headless.demo import concept_of, domains, host_diffusers, open_tower
from ..headless.learn import DEMO

FOLDER = ROOT / "web" / "docs"


def put(name: str, sheet: Image.Image):
    """Write a sheet as a JPEG, whole or not at all, and say so."""
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=88)
    print(write(FOLDER / name, data.getvalue()), f"{len(data.getvalue()) / 1024:.0f} KB")


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    photo, pipe = pictures.read(DEMO / "pictures" / "mimi.png"), host_diffusers.load(DEMO)
    host = host_diffusers.DiffusersHost(pipe, demo.SUPERCLASS, DEMO)
    domain = domains.load(DEMO / "domains" / f"{demo.SUPERCLASS}.safetensors")
    concept = concept_of(host, domain, open_tower(DEMO / "vision"), photo, demo.WORD)

    def draw(prompt, seed, strength=1.0):
        return host_diffusers.pictures(pipe, [prompt.format(demo.WORD)], [concept.at(strength)], seeds=[seed])

    made = [draw(prompt, k) for k, prompt in enumerate(demo.PROMPTS[:3])]
    above = ["the picture", *(f"… {prompt.partition(' of a {} ')[2]}" for prompt in demo.PROMPTS[:3])]
    put("encode.jpg", pictures.sheet([[photo, *made]], above, [""]))
    strengths = demo.STRENGTHS
    put("dial.jpg", pictures.sheet([[draw(demo.PROMPTS[1], 1, s) for s in strengths]], [f"{s:g}" for s in strengths],
                                   [demo.PROMPTS[1].format(demo.WORD)]))
