"""Train a domain on a folder of pictures, on one process or under `accelerate launch` on many.

    python -m headless train-domain MODEL PICTURES --tower CLIP_VISION --superclass cat --out cats.safetensors
    accelerate launch --num_processes 4 -m headless train-domain …          the same command, the same result

A picture may have captions beside it, `cat-12.txt` for `cat-12.png`: one a line, with {} or the superclass word where
the concept goes. What the VAE and the tower see is computed once and kept in `<out>.work`, with the checkpoint and
sheets of the pictures that are held out: the picture, and what the encoder makes of it.
"""

import hashlib
import re
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch
from transformers import CLIPVisionModel

from core import domain as domains
from core import host_diffusers
from core import tune as tuning
from core.encode import encode
from core.encoder import Encoder
from core.file import pack, write
from core.school import Schooling, train
from core.tower import Tower, hash_of, middle, tokens_of
from core.train_domain import WORD, Course

from . import pictures
from .learn import open_model

KINDS = ".png", ".jpg", ".jpeg", ".webp"
HELD = 4  # pictures that are not trained on


def open_tower(path) -> Tower:
    """The vision tower of a folder of transformers' CLIPVisionModel."""
    try:
        model = CLIPVisionModel.from_pretrained(str(path), local_files_only=True, torch_dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' is not a folder of a CLIP vision model (config.json and model.safetensors): "
                         f"{error}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Tower(model.config.image_size, hash_of(model.state_dict()),
                 lambda x: model(x.to(model.device), output_hidden_states=True).hidden_states[1:])


def captions_of(path: Path, superclass: str) -> list[str]:
    """The captions beside a picture, each with {} once, or the templates that concepts are learnt with."""
    beside = path.with_suffix(".txt")
    if not beside.exists():
        return list(tuning.TEMPLATES)
    lines = [line.strip() for line in beside.read_text(encoding="utf-8").splitlines() if line.strip()]
    named = [line if "{}" in line else re.sub(rf"\b{re.escape(superclass)}\b", "{}", line, count=1) for line in lines]
    bad = [line for line in named if line.count("{}") != 1]
    if bad or not lines:
        raise ValueError(f"Each caption in '{beside}' has to hold {{}} or the word {superclass} once, where the thing "
                         f"goes; got '{bad[0] if bad else 'no caption'}'.")
    return named


def seen(folder: Path, work: Path, host, tower: Tower, resolution: int, say=print):
    """(paths, latents (m, c, h, w), class tokens (m, l, w)) of the pictures of a folder, from `work` if they are."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in KINDS)
    if len(paths) < 2 * HELD:
        raise ValueError(f"'{folder}' holds {len(paths)} pictures ({', '.join(KINDS)}); a domain needs at least "
                         f"{2 * HELD}, and thousands to be of use.")
    key = hashlib.sha256(f"{tower.hash}{resolution}{host.base}".encode())
    for path in paths:
        key.update(f"{path.relative_to(folder)}{path.stat().st_size}{path.stat().st_mtime_ns}".encode())
    kept = work / f"seen-{key.hexdigest()[:16]}.safetensors"
    if not kept.exists():
        latents, tokens = [], []
        for k, path in enumerate(paths):
            picture = square(pictures.read(path), resolution)
            latents.append(host.latents(picture).half().cpu())
            tokens.append(tokens_of(tower, picture, Encoder.read).half())
            say(f"\rpictures read, once: {k + 1} of {len(paths)}", end="\n" * (k + 1 == len(paths)), flush=True)
        write(kept, pack({"latents": torch.cat(latents), "tokens": torch.cat(tokens)}, {}))
    stored = safetensors.torch.load_file(kept)
    return paths, stored["latents"], stored["tokens"]


def square(picture: torch.Tensor, side: int) -> torch.Tensor:
    """The middle square (1, side, side, 3) of a picture (1, H, W, 3)."""
    return middle(picture, side).movedim(1, -1)  # BCHW -> BHWC


def train_domain(arguments):
    """Learn what a family of things has in common, so that a new one of it is learnt in a few steps."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    class Machine(Accelerator):
        def move(self, optimizer):
            optimizer.step()  # the prepared one scales by itself

    patience = InitProcessGroupKwargs(timeout=timedelta(days=2))  # of the others, while one reads all pictures
    machine = Machine(mixed_precision=arguments.precision, cpu=not torch.cuda.is_available(),
                      kwargs_handlers=[patience])
    out = Path(arguments.out)
    if out.is_dir() or out.suffix != ".safetensors":
        raise ValueError(f"--out names the domain's file, cats.safetensors for one; got '{out}'.")
    work = out.with_suffix(".work")
    pipe, folder = open_model(arguments.model)
    pipe.to(machine.device)
    tower = open_tower(arguments.tower)
    resolution = arguments.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    host = host_diffusers.DiffusersHost(pipe, arguments.superclass, folder)
    with machine.main_process_first():
        paths, latents, tokens = seen(Path(arguments.pictures), work, host, tower, resolution)
    lines = [captions_of(path, arguments.superclass) for path in paths]
    settings = Schooling(arguments.steps, arguments.batch, arguments.accumulate, arguments.seed,
                         arguments.learning_rate, arguments.offset_learning_rate)
    train_on = len(paths) - HELD  # the last ones are held out

    def data(rows, generator):
        said = [lines[k][int(torch.randint(len(lines[k]), (), generator=generator))] for k in rows.tolist()]
        x = latents[rows].float()
        return x, torch.ones_like(x[:, :1]), tokens[rows].float(), said

    def domain(course, step):
        facts = {"steps": step, "pictures": train_on, "batch": settings.batch, "seed": settings.seed,
                 "learning_rate": settings.learning_rate, "offset_learning_rate": settings.offset_learning_rate,
                 "resolution": resolution, "model": Path(arguments.model).name}
        return course.domain(tower.hash, facts)

    def sample(course, step):
        learnt, rows = domain(course, step), []
        domains.save(learnt, out)
        for k in range(train_on, len(paths)):
            concept = encode(host, learnt, tokens[k : k + 1].float(), latents[k : k + 1].float().to(host.device),
                             arguments.superclass, WORD)
            prompts = [template.replace("{}", WORD) for template in tuning.TEMPLATES[:3]]
            made = host_diffusers.pictures(pipe, prompts, [concept.at(1)], seeds=range(len(prompts)))
            rows.append([square(pictures.read(paths[k]), resolution), *made.split(1)])
        sheet = pictures.sheet(rows, ["the picture", *tuning.TEMPLATES[:3]], [""] * HELD)
        print(f"\nstep {step}: {pictures.put(work / f'sample-{step:06}.png', sheet)}")

    def say(schooled):
        if machine.is_main_process:
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in schooled.numbers.items())
            print(f"\rstep {schooled.step} of {schooled.steps}, {numbers}, {schooled.seconds_left:.0f} s left ", end="",
                  flush=True)

    with host.training(latents[:1].float()):
        course = Course(host, arguments.superclass, tokens, latents, settings.seed)
        train(course, data, train_on, settings, machine, work / "checkpoint.pt", arguments.every, say, sample)
    if machine.is_main_process:
        domains.save(domain(course, settings.steps), out)  # of a finished training too, whose file was moved away
        print(f"\n{out}: {out.stat().st_size / 2**20:.1f} MB")
