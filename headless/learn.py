"""Tune and apply on a machine with Python alone, over a diffusers folder."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from core import concept as concepts
from core import host_diffusers
from core import tune as tuning
from core.once_more import once_more

from . import pictures
from .comfy import ROOT

DEMO, FOLDER = ROOT / "demo", ROOT / "build" / "perfusion"


def open_model(path):
    """The pipeline of a diffusers folder, or of the demo's, and the folder that keeps its covariance."""
    path = Path(path)
    try:
        if (path / "training.json").exists():
            return host_diffusers.load(path), path
        if not path.is_dir():  # else the library would take it for a name to download
            raise FileNotFoundError("there is no such folder")
        pipe = DiffusionPipeline.from_pretrained(str(path), local_files_only=True, safety_checker=None)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"'{path}' is not a folder of a diffusers pipeline (model_index.json, unet, vae and so on), "
                         f"or a file of it is missing or damaged: {error}") from error
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    return pipe, FOLDER


def place(out, name: str) -> Path:
    """The file that `out` names, or one of this name in the folder that it names."""
    out = Path(out)
    return out if out.suffix == ".safetensors" else out / f"{name}.safetensors"


def target(out, name: str) -> Path:
    """The `place` that --out asks for. Raises ValueError where there is a file."""
    out = place(out, name)
    if out.exists():
        raise ValueError(f"'{out}' is there already, and was left as it is. Move it, or name another file with --out.")
    return out


def say(progress):
    """Print one step."""
    end = "\n" if progress.step == progress.steps else ""
    print(f"\rstep {progress.step} of {progress.steps}, loss {progress.losses[-1]:.4f}, "
          f"{progress.seconds_left:.0f} s left ", end=end, flush=True)


def captions(done, total, file=None):
    print(f"\rcaptions read, once for this text encoder: {done} of {total}", end="\n" * (done == total), flush=True,
          file=file)


def alike(paths) -> torch.Tensor:
    """The pictures (m, H, W, 3) of files. Raises ValueError where they are not of one size."""
    images = [pictures.read(path) for path in paths]
    sizes = {picture.shape[1:3] for picture in images}
    if len(sizes) > 1:
        raise ValueError(f"The pictures are of {len(sizes)} sizes ({', '.join(f'{w}×{h}' for h, w in sorted(sizes))}), "
                         "and have to be of one. Crop or scale them alike.")
    return torch.cat(images)


def given(arguments):
    """What a tune learns from: pictures (m, H, W, 3), a mask (1, H, W) or none, an earlier concept or none."""
    return (alike(arguments.pictures), pictures.read(arguments.mask)[..., 0] if arguments.mask else None,
            concepts.load(arguments.concept) if arguments.concept else None)


def learn(host, arguments, images, mask, start, out: Path, report=say, note=lambda text: print(f"\n{text}")):
    """The concept of what was `given`, in the file `out`, with the command's other arguments. Raises as `tune` does."""
    if start:
        host_diffusers.words_of(host.pipe, [start])  # refuses one of another model
    resolution = arguments.resolution or host.pipe.unet.config.sample_size * host.pipe.vae_scale_factor
    settings = tuning.Tuning(steps=tuning.advised(start) if arguments.steps is None else arguments.steps,
                             batch=arguments.batch, seed=arguments.seed, resolution=resolution,
                             mirror=arguments.mirror)

    def keep(concept):
        return str(concepts.save(concept, out.with_stem(f"{out.stem}-stopped")))

    def attempt(settings, tight):
        return tuning.tune(host, images, arguments.superclass, arguments.word, settings, mask, start, report, keep,
                           tight)

    learnt = once_more(host, attempt, settings, note)
    concepts.save(learnt, out)
    return learnt


def tune(arguments):
    """Learn one concept."""
    out, what = target(arguments.out, arguments.word.strip("<>")), given(arguments)
    pipe, folder = open_model(arguments.model)
    host = host_diffusers.DiffusersHost(pipe, arguments.superclass, folder, captions)
    learn(host, arguments, *what, out)
    print(f"{out}: {out.stat().st_size / 1024:.1f} KB")


def apply(arguments):
    """Make pictures of prompts that hold the words of learnt concepts."""
    pipe, _ = open_model(arguments.model)
    learnt = [concepts.load(path) for path in arguments.concepts]
    if arguments.strength is not None:
        learnt = [concept.at(arguments.strength) for concept in learnt]
    made = host_diffusers.pictures(pipe, [arguments.prompt] * arguments.count, learnt, arguments.negative,
                                   arguments.steps, arguments.guidance,
                                   range(arguments.seed, arguments.seed + arguments.count))
    for k, picture in enumerate(made):
        print(pictures.write(Path(arguments.out) / f"{arguments.seed + k}.png", picture[None]))
