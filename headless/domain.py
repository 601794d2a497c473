"""Train a domain on a folder of pictures or on shards, on one process or under `accelerate launch` on many.

    python -m headless train-domain MODEL PICTURES --tower CLIP_VISION --superclass cat --out cats.safetensors
    accelerate launch --num_processes 4 -m headless train-domain …          the same command, the same result

`--begin` takes another domain's encoder to begin with: pets, to go on to cats. A picture may have captions beside it,
`cat-12.txt` for `cat-12.png`: one a line, with {} or the superclass word where the concept goes. What the VAE and the
tower see of a folder is computed once and kept in `<out>.work`, with the checkpoint and sheets of the pictures that are
held out: the picture, and what the encoder makes of it. Shards are for sets that are too large for that: shards.py.
Where processes run on several machines, `--out` is in a folder that they share.
"""

from datetime import timedelta
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor

from core import domain as domains
from core import host_diffusers
from core import tune as tuning
from core.checkpoint import Checkpoint
from core.encode import check, encode
from core.fingerprint import fingerprint
from core.prompt_diffusers import text_weights
from core.school import Diverged, Schooling, train
from core.tower import Tower
from core.train_domain import WORD, Course

from . import pictures
from .album import HELD, captions_of, seen, square
from .encode import open_tower
from .learn import open_model
from .shards import opened, passing

# A checkpoint refuses other learning rates than those that it began with, and takes another precision.
WAY_OUT = ("A checkpoint that was written is as it was. With --precision fp16, go on from it with bf16 or no; else "
           "begin anew with a lower --learning-rate and another --out. If it stops at the first step, the model or the "
           "VAE gives NaN by itself: use another.")


def facts_of(host, tower: Tower, album, lines: list[list[str]], resolution: int) -> dict:
    """What a training is of beside its settings: model, covariance, tower, and the pictures of an album with captions
    of theirs."""
    pipe = host.pipe
    model = fingerprint(host.prediction, host.log_sigmas, pipe.unet.state_dict(), pipe.vae.state_dict(),
                        text_weights(host.encoders))
    hashes = {"model": model, "covariance": host.inverse_covariance()[1], "tower": tower.hash, "pictures": album.hash,
              "captions": fingerprint(lines)}
    return {name: found[:16] for name, found in hashes.items()} | {"resolution": resolution}


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
    if machine.device.type == "cpu":
        pipe.unet.set_attn_processor(AttnProcessor())  # the fused attention's way back is slower there
    tower = open_tower(arguments.tower)
    resolution = arguments.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    host = host_diffusers.DiffusersHost(pipe, arguments.superclass, folder)
    with machine.main_process_first():
        album = opened(arguments.pictures, work)
        known = album.sample(arguments.seed)
        lines = [captions_of(album, row, host) for row in known]
        latents, tokens = seen(album, known, work, host, tower, resolution)
        host.inverse_covariance()  # so that its captions are read once as well
    begun = domains.load(arguments.begin) if arguments.begin else None
    if begun:  # another superclass is another word to be an offset of, and a start all the same
        check(begun, host.base, host.prediction, tower.hash, begun.superclass)
    settings = Schooling(arguments.steps, arguments.batch, arguments.accumulate, arguments.seed,
                         arguments.learning_rate)
    train_on = len(album) - HELD  # the last ones are held out
    if machine.is_main_process:
        print(f"{train_on} pictures to learn from, on {machine.num_processes} processes", flush=True)
    with_what = begun and begun.hash[:16]
    facts = facts_of(host, tower, album, lines, resolution) | {"begun": with_what}
    checkpoint = Checkpoint(work / "checkpoint.pt", facts)

    def data(rows, turns):
        if len(known) == len(album):
            said = [lines[row][turn % len(lines[row])] for row, turn in zip(rows.tolist(), turns.tolist())]
            x, f = latents[rows], tokens[rows]
        else:
            x, f, said = passing(album, rows, turns, train_on, host, tower, resolution)
        x = x.float()
        return x, torch.ones_like(x[:, :1]), f.float(), said

    def domain(course, step):
        facts = {"steps": step, "pictures": train_on, "batch": settings.batch, "seed": settings.seed,
                 "learning_rate": settings.learning_rate, "resolution": resolution, "model": Path(arguments.model).name}
        facts |= {"begun": with_what} if begun else {}
        return course.domain(tower.hash, facts)

    def sample(course, step):
        learnt, rows = domain(course, step), []
        domains.save(learnt, out)
        for row, x, f in zip(known[-HELD:], latents[-HELD:].split(1), tokens[-HELD:].split(1)):
            concept = encode(host, learnt, f.float(), x.float().to(host.device), arguments.superclass, WORD)
            prompts = [template.replace("{}", WORD) for template in tuning.TEMPLATES[:3]]
            made = host_diffusers.pictures(pipe, prompts, [concept.at(0.75)], seeds=range(len(prompts)))
            rows.append([square(album.picture(row), resolution), *made.split(1)])
        sheet = pictures.sheet(rows, ["the picture", *tuning.TEMPLATES[:3]], [""] * HELD)
        print(f"\nstep {step}: {pictures.put(work / f'sample-{step:06}.png', sheet)}")

    def say(schooled):
        if machine.is_main_process:
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in schooled.numbers.items())
            print(f"\rstep {schooled.step} of {schooled.steps}, {numbers}, {schooled.seconds_left:.0f} s left ", end="",
                  flush=True)

    with host.training(latents[:1].float()):
        course = Course(host, arguments.superclass, tokens, settings.seed, begun=begun)
        try:
            train(course, data, train_on, settings, machine, checkpoint, arguments.every, say, sample)
        except Diverged as error:
            error.args = (f"{error} {WAY_OUT}",)
            raise
    if machine.is_main_process:
        domains.save(domain(course, settings.steps), out)  # of a finished training too, whose file was moved away
        print(f"\n{out}: {out.stat().st_size / 2**20:.1f} MB")
