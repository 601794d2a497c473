"""The pack's work without a screen, run in the pack's folder: `python -m headless convert FILE --word "<teddy>"`.

A command is one function that takes the parsed arguments, its docstring the help, and one entry in COMMANDS. What it
cannot do it raises as a ValueError or OSError with a sentence; that goes to stderr, and the exit status is 2.
"""

import argparse
import sys
from pathlib import Path

from core import concept, importers

from .comfy import ROOT, serve
from .demo import demo


def convert(arguments):
    """Turn a concept file of another Perfusion program (.ckpt, .pt) into this pack's .safetensors."""
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        out = out / f"{arguments.word.strip('<>')}.safetensors"
    if out.exists():
        raise ValueError(f"'{out}' is there already, and was left as it is. Move it, or name another file with --out.")
    learned, notes = importers.convert(arguments.file, arguments.word, arguments.superclass, arguments.index)
    concept.save(learned, out)
    print(*notes, f"{out} ({out.stat().st_size / 1024:.0f} KB)", sep="\n")


def comfy(arguments):
    """Start ComfyUI's server with this pack linked, on a folder of its own under build/."""
    server = serve(ROOT / "build" / "comfy", arguments.port)
    try:
        server.wait()
    except KeyboardInterrupt:
        server.wait()


def option(*names, **settings):
    return names, settings


COMMANDS = {
    demo: (
        option("checkpoint", help="an SD1.5, SD2.x or SDXL checkpoint"),
        option("--captions", type=int, default=4096, help="captions for the covariance (default 4096)"),
        option("--steps", type=int, default=3, help="steps to learn (default 3)"),
        option("--resolution", type=int, default=256, help="pixels a side (default 256)"),
        option("--out", default=str(ROOT / "build"), help="the folder for what it makes (default build)"),
    ),
    comfy: (option("--port", type=int, default=8188, help="default 8188"),),
    convert: (
        option("file", help="a .ckpt of ChenDarYen's program or a .pt of perfusion-pytorch"),
        option("--word", required=True, help='the concept\'s word in prompts, in angle brackets: "<teddy>"'),
        option("--superclass", default="", help="the plain word for its kind, where the file does not say it: teddy"),
        option("--index", type=int, default=0, help="which concept, of a .pt that holds several (default 0)"),
        option("--out", default=".", help="a .safetensors file, or a folder for one named after the word (default .)"),
    ),
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
