"""The pack's work without a screen, run in the pack's folder: `python -m headless convert FILE --word "<teddy>"`.

A command is one function that takes the parsed arguments, its docstring the help, and one entry in COMMANDS. What it
cannot do it raises as a ValueError or OSError with a sentence; that goes to stderr, and the exit status is 2.
"""

import argparse
import sys
from importlib import import_module

from core.school import Schooling
from core.tune import STEPS, STEPS_FROM_CONCEPT, Tuning

from .comfy import ROOT, serve
from .doctor import doctor


def found(module: str, name: str):
    """A command's function, or where a package is missing one that says so: ComfyUI's Python has no diffusers, and
    the doctor works in it."""
    try:
        return getattr(import_module(f".{module}", __package__), name)
    except ModuleNotFoundError as error:
        lacking = error.name

    def refuse(arguments):
        raise ValueError(f"This command needs the package {lacking}, which this Python lacks. Run it in the "
                         "pack's own, which `make setup` makes; ComfyUI's is better left as it is.")

    refuse.__name__, refuse.__doc__ = name, f"Needs the package {lacking}."
    return refuse


apply, tune = found("learn", "apply"), found("manifest", "tune")
convert, demo, encode = found("convert", "convert"), found("demo", "demo"), found("encode", "encode")
train_domain = found("domain", "train_domain")


def comfy(arguments):
    """Start ComfyUI's server with this pack linked, on a folder of its own under build/."""
    server = serve(ROOT / "build" / "comfy", arguments.port)
    try:
        server.wait()
    except KeyboardInterrupt:
        server.wait()


def option(*names, **settings):
    return names, settings


class Unless(argparse.Action):
    """Arguments that need not be there, though one at least where they are. With `*` in the place of `+` none of them
    would be found behind an option."""

    def __init__(self, **settings):
        super().__init__(**settings | {"required": False})

    def __call__(self, parser, namespace, values, name=None):
        setattr(namespace, self.dest, values)


COMMANDS = {
    demo: (
        option("picture", nargs="?", help="a picture of a creature (default: one that comes with the pack)"),
        option("--steps", type=int, default=STEPS_FROM_CONCEPT, help=f"to learn (default {STEPS_FROM_CONCEPT})"),
        option("--seed", type=int, default=0, help="default 0"),
        option("--out", default=str(ROOT / "build"), help="the folder for what it makes (default build)"),
    ),
    tune: (
        option("model", help="a folder of a diffusers pipeline: SD1.5, SD2.x, SDXL, or this pack's demo"),
        option("pictures", nargs="+", action=Unless, help="pictures of one thing, of one size"),
        option("--manifest", metavar="FILE", help="instead of pictures a .csv with a concept in each line: columns "
               "picture (several with ; between them), word, superclass, mask, concept, steps, seed, out. What a line "
               "lacks is as the options say; its paths begin where the .csv is, and its out in --out. A line that has "
               "its file already is skipped"),
        option("--superclass", help="the plain word for its kind: cat, person, toy"),
        option("--word", default="<mimi>", help='the new word for it, in angle brackets (default "<mimi>")'),
        option("--concept", help="go on from this file's concept, such as what `encode` wrote"),
        option("--steps", type=int, help=f"default {STEPS}, and {STEPS_FROM_CONCEPT} from a concept"),
        option("--batch", type=int, default=Tuning.batch, help=f"samples in each step (default {Tuning.batch})"),
        option("--seed", type=int, default=0, help="default 0"),
        option("--resolution", type=int, help="pixels a side, about (default: what the pipeline was made for)"),
        option("--mirror", action="store_true", help="learn from mirrored copies too"),
        option("--mask", help="a picture that is white where the thing is"),
        option("--out", default=".", help="a .safetensors file, or a folder for one named after the word (default .); "
               "with --manifest that folder, and a .jsonl of each process goes there too"),
    ),
    encode: (
        option("model", help="the folder of the pipeline that the domain was trained on, or this pack's demo"),
        option("pictures", nargs="+", help="pictures of one thing, of one size"),
        option("--domain", required=True, help="the domain's file"),
        option("--tower", required=True, help="the folder of the CLIP vision model that it was trained with"),
        option("--word", default="<mimi>", help='the new word for it, in angle brackets (default "<mimi>")'),
        option("--out", default=".", help="a .safetensors file, or a folder for one named after the word (default .)"),
    ),
    apply: (
        option("model", help="the folder of the pipeline that the concepts were learnt on"),
        option("concepts", nargs="+", help="concept files"),
        option("--prompt", required=True, help='what to draw: "a photo of <mimi> in the snow"'),
        option("--negative", default="", help="what not to draw"),
        option("--strength", type=float, help="0 to 1, of all concepts (default: as each was saved)"),
        option("--count", type=int, default=1, help="pictures (default 1)"),
        option("--seed", type=int, default=0, help="of the first picture; the others count on (default 0)"),
        option("--steps", type=int, default=25, help="sampling steps (default 25)"),
        option("--guidance", type=float, default=6.0, help="default 6"),
        option("--out", default=".", help="the folder for the pictures (default .)"),
    ),
    train_domain: (
        option("model", help="a folder of a diffusers pipeline: SD1.5, SD2.x, SDXL, or this pack's demo"),
        option("pictures", help="a folder of pictures, with captions beside them or without, or webdataset shards: "
               "their folder, or all of them as 'cats-{000..099}.tar'"),
        option("--tower", required=True, help="a folder of a CLIP vision model, such as CLIP-ViT-H-14"),
        option("--superclass", required=True, help="the plain word for what they have in common: cat, person, toy"),
        option("--out", required=True, help="the .safetensors file; its checkpoint and samples go beside it"),
        option("--begin", help="a domain to begin with, of the same model and tower, instead of from nothing"),
        option("--steps", type=int, default=Schooling.steps, help=f"default {Schooling.steps}"),
        option("--batch", type=int, default=Schooling.batch, help=f"pictures a step (default {Schooling.batch})"),
        option("--accumulate", type=int, default=1, help="parts of a step, to need less memory (default 1)"),
        option("--learning-rate", type=float, default=Schooling.learning_rate, help="of the encoder"),
        option("--seed", type=int, default=0, help="default 0"),
        option("--resolution", type=int, help="pixels a side (default: what the pipeline was made for)"),
        option("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision (default no)"),
        option("--every", type=int, default=500, help="steps between checkpoints and samples (default 500)"),
    ),
    comfy: (option("--port", type=int, default=8188, help="default 8188"),),
    convert: (
        option("file", help="a .ckpt of ChenDarYen's program, a .pt of perfusion-pytorch, a folder of e4t-diffusion"),
        option("--word", default="", help='the concept\'s word in prompts, in angle brackets: "<teddy>"'),
        option("--superclass", default="", help="the plain word for its kind, where the file does not say it: teddy"),
        option("--index", type=int, default=0, help="which concept, of a .pt that holds several (default 0)"),
        option("--model", help="of a tuned folder: the diffusers folder of the base that it was tuned from"),
        option("--picture", help="of a tuned folder: the picture that it was tuned on, its domain.png"),
        option("--tower", help="of a tuned folder: a folder of the CLIP vision model, CLIP-ViT-H-14"),
        option("--out", default=".", help="a .safetensors file, or a folder for one named after the word (default .)"),
    ),
    doctor: (option("files", nargs="+", metavar="file", help="a concept, a domain, or a folder of them"),),
}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m headless", description="Perfusion concepts without a screen.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for run, options in COMMANDS.items():
        command = commands.add_parser(run.__name__.replace("_", "-"), help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        for names, settings in options:
            command.add_argument(*names, **settings)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except OSError as error:
        print(str(error).removeprefix(f"[Errno {error.errno}] "), file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
