"""The main job on one page, with nothing but Python: a picture becomes a concept, a file, and a word in prompts.

The picture is of a creature that the demo's model never saw. The sheet shows it beside what the concept makes of each
prompt, from strength 0, which is the model without the concept, to 1.
"""

from pathlib import Path

import torch

from core import concept as concepts
from core import host_diffusers
from core import tune as tuning

from . import pictures
from .learn import DEMO, captions, say

WORD, SUPERCLASS = "<mimi>", "creature"
PROMPTS = ("a flat drawing of a {} in the snow", "a clay model of a {} at the beach",
           "an ink drawing of a {} wearing a crown on a stage", "a pastel drawing of a {} holding a balloon at night")
STRENGTHS = (0, 0.25, 0.5, 0.75, 1)


def demo(arguments):
    """Learn a creature from one picture on the model that comes with the pack, and draw it in other places."""
    torch.set_num_threads(1)  # more gain nothing on so small a model, and on a busy machine wait for each other
    out, photo = Path(arguments.out), pictures.read(arguments.picture or DEMO / "pictures" / "mimi.png")
    pipe = host_diffusers.load(DEMO)
    host = host_diffusers.DiffusersHost(pipe, SUPERCLASS, DEMO, captions)
    settings = tuning.Tuning(steps=arguments.steps, seed=arguments.seed, resolution=128)
    learnt = tuning.tune(host, photo, SUPERCLASS, WORD, settings, report=say,
                         keep=lambda concept: str(concepts.save(concept, out / "mimi-stopped.safetensors")))
    path = concepts.save(learnt, out / "mimi.safetensors")
    print(f"{path}: {path.stat().st_size / 1024:.1f} KB")
    learnt, rows = concepts.load(path), []
    for k, prompt in enumerate(PROMPTS):
        made = [host_diffusers.pictures(pipe, [prompt.format(WORD)], [learnt.at(s)], seeds=[k]) for s in STRENGTHS]
        rows.append([photo, *made])
    sheet = pictures.sheet(rows, ["the picture", *(f"strength {s:g}" for s in STRENGTHS)],
                           [prompt.format(WORD) for prompt in PROMPTS])
    print(pictures.put(out / "demo.png", sheet))
