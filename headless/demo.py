"""The main job on one page, with nothing but Python: a picture becomes a concept, a file, and a word in prompts.

The picture is of a creature that the demo's model never saw. The demo's domain, which knows creatures, encodes it, and
a few steps improve on that. The sheet shows the picture, what the concept makes of each prompt before any step, and
after them from strength 0, which is the model without the concept, to 1.
"""

from pathlib import Path

import torch

from core import concept as concepts
from core import domain as domains
from core import host_diffusers
from core import tune as tuning

from . import pictures
from .encode import concept_of, open_tower
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
    domain = domains.load(DEMO / "domains" / f"{SUPERCLASS}.safetensors")
    encoded = concept_of(host, domain, open_tower(DEMO / "vision"), photo, WORD)
    settings = tuning.Tuning(steps=arguments.steps, seed=arguments.seed, resolution=128)
    learnt = tuning.tune(host, photo, SUPERCLASS, WORD, settings, start=encoded, report=say,
                         keep=lambda concept: str(concepts.save(concept, out / "mimi-stopped.safetensors")))
    path = concepts.save(learnt, out / "mimi.safetensors")
    print(f"{path}: {path.stat().st_size / 1024:.1f} KB")
    learnt, rows = concepts.load(path), []
    for k, prompt in enumerate(PROMPTS):
        shown = [encoded.at(0.75), *(learnt.at(s) for s in STRENGTHS)]
        made = [host_diffusers.pictures(pipe, [prompt.format(WORD)], [concept], seeds=[k]) for concept in shown]
        rows.append([photo, *made])
    above = ["the picture", "no step, 0.75", *(f"{arguments.steps} steps, {s:g}" for s in STRENGTHS)]
    sheet = pictures.sheet(rows, above, [prompt.format(WORD) for prompt in PROMPTS])
    print(pictures.put(out / "demo.png", sheet))
