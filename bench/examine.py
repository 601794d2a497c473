"""What a run is asked: the prompts of a creature that the miniature never saw, and the scores of what is drawn of them.

Prompts differ from the (first) training picture in every context column, but that half of them stand alone as it does.
OPEN prompts name no context at all: only these show what of the training picture leaks. OTHERS never name the concept,
and show the drift of all else. Letters: b pictures drawn, f factors, d features.
"""

import math
from functools import cache, partial
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPVisionModel

from ..core import host_diffusers
from ..core.tower import Tower, of_transformers
from . import metrics, world
from . import reader as judge

DEMO = Path(__file__).resolve().parent.parent / "demo"
WORD, SUPERCLASS = "<mimi>", "creature"
PROMPTS, OPEN, OTHERS, FREE = 6, 3, 3, 12
SAMPLING, GUIDANCE = 10, 4.0  # steps of DPM-Solver++
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def miniature(folder=None):
    """The miniature as a pipeline, on the device: its UNet computes in bf16, as it does for most artists, from weights
    in fp32, and pictures take few steps (Lu et al. 2022, arXiv 2211.01095)."""
    pipe = host_diffusers.load(folder or DEMO).to(DEVICE)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    if DEVICE == "cpu":
        pipe.unet.set_attn_processor(AttnProcessor())  # faster there than the fused one, above all on the way back
    pipe.unet.forward = torch.autocast(DEVICE, torch.bfloat16)(pipe.unet.forward)
    pipe.unet.register_forward_hook(in_full)
    return pipe


@cache
def tower() -> Tower:
    """The miniature's vision tower."""
    return of_transformers(CLIPVisionModel.from_pretrained(DEMO / "vision", torch_dtype=torch.float32).eval())


def in_full(unet, inputs, answer):
    """The UNet's answer in fp32: samplers keep their latents in its type."""
    return (answer[0].float(),) if isinstance(answer, tuple) else type(answer)(sample=answer.sample.float())


@cache
def creature(split: str, k: int, prompts: int | None = None):
    """(identity (1, f), five training contexts, so many or PROMPTS unlike the first) of a split's k-th creature."""
    generator = torch.Generator().manual_seed(7919 * (k + 1) + 104729 * list(world.SPLITS).index(split))
    who = world.identities(1, split, SUPERCLASS, generator)
    training = world.contexts(5, generator, company="alone")
    wanted = world.unlike(training[:1].expand(prompts or PROMPTS, -1), generator)
    wanted[::2, world.COMPANY] = 0
    return who, training, wanted


@cache
def gallery():
    """63 other identities (63, f) of the test split."""
    return world.identities(metrics.GALLERY - 1, "test", SUPERCLASS, torch.Generator().manual_seed(6))


@cache
def free_renders(split: str, k: int):
    """Features (1, FREE, d) of true pictures of a creature in any context: what diversity is measured against."""
    who, _, _ = creature(split, k)
    contexts = world.contexts(FREE, torch.Generator().manual_seed(k), company="alone")
    return judge.load().read(world.render(SUPERCLASS, who.expand(FREE, -1), contexts)[0]).features[None]


def ours(pipe, concepts, prompts, seeds):
    """Pictures (b, H, W, 3) as anyone makes them, with concepts applied."""
    return host_diffusers.pictures(pipe, prompts, concepts, steps=SAMPLING, guidance=GUIDANCE, seeds=seeds)


class Examiner:
    """Scores what is drawn of a creature's prompts. A `draw` answers pictures (b, H, W, 3) to prompts and seeds."""

    def __init__(self, pipe, split: str, k: int):
        self.split, self.k = split, k
        self.who, self.training, self.wanted = creature(split, k)
        contexts = world.contexts(OTHERS, torch.Generator().manual_seed(99), company="alone")
        self.others = [world.context_caption(contexts[n : n + 1], subject)[0]
                       for n, subject in enumerate((SUPERCLASS, SUPERCLASS, "house"))]
        self.before = self.made(partial(ours, pipe, ()), self.others)

    def made(self, draw, prompts):
        return draw(prompts, [1000 * self.k + n for n in range(len(prompts))]).movedim(-1, 1).cpu()  # BHWC -> BCHW

    def scores(self, draw, word: str = WORD) -> dict[str, float | None]:
        """Scores with `word` in the creature's place; None where the pictures are no numbers."""
        prompts = [*world.context_caption(self.wanted, word), *[f"a picture of a {word}"] * OPEN]
        made = self.made(draw, prompts)
        read, free = judge.load().read(made[:PROMPTS]), judge.load().read(made[PROMPTS:])
        believed, who = read.of(SUPERCLASS, self.wanted), self.who.expand(PROMPTS, -1)
        line_up = torch.cat([gallery(), self.who])
        copied = self.training[:1].expand(OPEN, -1)
        found = metrics.identity(SUPERCLASS, believed, who) | {
            "guess": metrics.identity(SUPERCLASS, believed, who, guess=True)["identity"],
            "top1": metrics.top1(SUPERCLASS, believed, line_up, torch.full((PROMPTS,), len(line_up) - 1)),
            "alignment": metrics.alignment(read, self.wanted, SUPERCLASS),
            "leak": metrics.leak(free, copied, copied, metrics.COLUMNS),
            "drift": metrics.drift(self.before, self.made(draw, self.others)),
            "diversity": metrics.diversity(free.features[None], free_renders(self.split, self.k)),
        }
        means = {name: score.float().mean().item() for name, score in found.items()}
        sound = made.isfinite().all()
        return {name: round(mean, 5) if sound and math.isfinite(mean) else None for name, mean in means.items()}
