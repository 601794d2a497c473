"""`python -m bench styles`: a domain of something abstract, how a picture is drawn, and what it makes of one picture.

A style is one of the world's four and a wash: the grey of the picture in one colour, laid over it by a share. No
caption names a wash, and the miniature never saw one. The superclass is "picture": its pictures are of creatures,
houses and flowers, and captions beside them say all but the style, so that "a <mimi> of a red creature on the beach" is
that creature, drawn like the one picture given. The scores are of styles that were not trained on:

    style       the share of pictures drawn in the right one of the four
    wash        1 − |cast − cast*| / |cast₀ − cast*| of mean colours over the prompts: cast* of true pictures of the
                context with the wash, cast₀ without; 0 is no wash, 1 the very one
    alignment   the share of all else that is as the prompt says
"""

import argparse
import colorsys
import json
import subprocess
import sys

import torch
from PIL import Image

from ..core import domain as domains
from ..core.concept import Concept
from ..core.encode import encode
from ..core.host_diffusers import DiffusersHost
from ..core.tower import tokens_of
from ..core.tune import Lesson, Tuning, fit, schedule
from . import metrics, world
from . import reader as judge
from .domain import CHUNK, draw
from .examine import DEMO, WORD, miniature, ours, tower
from .make_world import ROOT, WORK
from .table import mean_se

STYLE, PICTURES, SEED = "picture", 4000, 11
SETTINGS = {"steps": 2000, "batch": 16, "learning-rate": 2e-3, "every": 500, "precision": "bf16"}
TRAINED, RESULTS = WORK / "styles.safetensors", ROOT / "bench" / "results" / "styles.json"
STEPS, PROMPTS, STRONGEST = 5, 6, 0.6
TEMPLATES = "a {} of a creature", "a {}", "the {} of a house", "a good {} of a flower"
COLUMN = metrics.COLUMNS.index("style")


def washes(n: int, generator):
    """n random washes (n, 4): a colour, and the share of it."""
    hue, share = torch.rand(2, n, generator=generator)
    colours = torch.tensor([colorsys.hsv_to_rgb(h, 0.8, 1.0) for h in hue.tolist()])
    return torch.cat([colours, STRONGEST * share[:, None]], 1)


def washed(pictures, wash):
    """Pictures (m, 3, H, W) in 0..1 under washes (m, 4)."""
    colour, share = wash[:, :3, None, None], wash[:, 3:, None, None]
    return pictures.lerp(pictures.mean(1, keepdim=True) * colour, share)


def scene(n: int, split: str, generator):
    """n random subjects: (superclass (n), identity (n, f))."""
    kinds = torch.randint(len(world.SUPERCLASSES), (n,), generator=generator)
    who = torch.stack([world.identities(1, split, world.SUPERCLASSES[k], generator)[0] for k in kinds])
    return kinds, who


def caption(context, subject: str) -> str:
    """Of one context (1, c): all but the style, with {} for what says it."""
    said, = world.context_caption(context, subject, leave_out=("style",))
    return said.replace("a picture of", "a {} of", 1)


def chunk(first: int):
    """As `domain.chunk`: pictures in bytes from the first on, and the one caption of each."""
    generator = torch.Generator().manual_seed(SEED * 100_000 + first)
    context, (kinds, who) = world.contexts(CHUNK, generator, company="alone"), scene(CHUNK, "train", generator)
    pictures = washed(world.render(kinds, who, context)[0], washes(CHUNK, generator))
    subjects = [world.rich_subject(world.SUPERCLASSES[kind], who[k : k + 1]) for k, kind in enumerate(kinds)]
    return (pictures * 255).byte(), [(caption(context[k : k + 1], subject),) for k, subject in enumerate(subjects)]


def concepts(host, picture) -> dict[str, Concept]:
    """What the domain makes of a picture (1, H, W, 3), and what five steps make of that."""
    domain = domains.load(TRAINED)
    settings = Tuning(steps=STEPS, resolution=world.SIZE, templates=TEMPLATES)
    latents, generator = host.latents(fit(picture, world.SIZE)), torch.Generator().manual_seed(0)
    encoded = encode(host, domain, tokens_of(tower(), picture, domain.encoder.read), latents, STYLE, WORD)
    with host.training(latents):
        lesson = Lesson(host, STYLE, WORD, encoded.embedding, host.inverse_covariance()[0], settings, encoded)
        for sample in schedule(settings, 1, generator):
            lesson.step(latents, torch.ones_like(latents[:, :1]), sample, generator)
    return {"encoded": encoded.at(1.0), f"{STEPS} steps": encoded.replace(**lesson.learnt()).at(1.0)}


def scores(read, made, wanted, true, plain) -> dict[str, float]:
    """Of pictures made (m, 3, H, W) for contexts wanted (m, c), beside true ones with the wash and plain ones."""
    found = metrics.right(read, wanted, "creature").float()
    cast = [pictures.mean((0, 2, 3)) for pictures in (made, true, plain)]
    wash = 1 - (cast[0] - cast[1]).norm() / (cast[2] - cast[1]).norm()
    rest = [k for k in range(found.shape[1]) if k != COLUMN]
    return {"style": found[:, COLUMN].mean().item(), "wash": wash.item(), "alignment": found[:, rest].mean().item()}


def examined(host, k: int):
    """{row: scores} of the k-th style that was not trained on, and its pictures (1 or m, 3, H, W) by row."""
    generator = torch.Generator().manual_seed(7919 * (k + 1))
    (kinds, who), context = scene(1, "test", generator), world.contexts(1, generator, company="alone")
    wash = washes(1, generator)
    wash[:, 3] = STRONGEST * (k % 2 + 1) / 2
    one = washed(world.render(kinds, who, context)[0], wash)
    wanted = world.unlike(context.expand(PROMPTS, -1), generator)
    wanted[:, world.COMPANY], wanted[:, world.STYLE] = 0, context[:, world.STYLE]
    others = world.identities(PROMPTS, "test", "creature", generator)
    plain = world.render("creature", others, wanted)[0]
    true = washed(plain, wash.expand(PROMPTS, -1))
    lines = [caption(wanted[m : m + 1], "creature") for m in range(PROMPTS)]
    spoken = world.context_caption(wanted, "creature")
    seeds = [1000 * k + m for m in range(PROMPTS)]
    made = {"true pictures": true, "class word": ours(host.pipe, (), [x.replace("{}", STYLE) for x in lines], seeds),
            "style words": ours(host.pipe, (), spoken, seeds)}
    for name, concept in concepts(host, one.movedim(1, -1)).items():
        made[name] = ours(host.pipe, (concept,), [x.replace("{}", WORD) for x in lines], seeds)
    made = {name: p if name == "true pictures" else p.movedim(-1, 1).cpu() for name, p in made.items()}
    found = {name: scores(judge.load().read(p), p, wanted, true, plain) for name, p in made.items()}
    return found, {"the picture": one} | made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32, help="how many styles")
    n = parser.parse_args().n
    folder = WORK / "domain-styles"
    draw(folder, PICTURES, chunk)
    settings = [f"--{option}={value}" for option, value in SETTINGS.items()]
    subprocess.run([sys.executable, "-m", "headless", "train-domain", DEMO, folder, "--tower", DEMO / "vision",
                    "--superclass", STYLE, "--out", TRAINED, *settings], cwd=ROOT, check=True)
    host = DiffusersHost(miniature(), STYLE, DEMO)
    rows, sheet = {}, []
    for k in range(n):
        found, made = examined(host, k)
        sheet.append(torch.cat([p[0] for p in made.values()], 2))
        for name, of in found.items():
            rows.setdefault(name, []).append(of)
    mean = {name: {key: mean_se([one[key] for one in of])[::2] for key in of[0]} for name, of in rows.items()}
    for name, of in mean.items():
        print(name.ljust(16), *(f"{key} {m:.3f} ± {se:.3f}" for key, (m, se) in of.items()), sep="  ")
    RESULTS.write_text(json.dumps({"n": n, "rows": mean}, indent=1) + "\n", encoding="utf-8")
    whole = torch.cat(sheet[:6], 1).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(whole).save(RESULTS.with_suffix(".png"))
