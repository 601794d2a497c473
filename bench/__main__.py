"""The bench: `python -m bench`, run in the pack's folder. It needs no ComfyUI, and imports it where it is found."""

import argparse
import importlib
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # is read when torch is imported; waiting threads slow the others

COMMANDS = {
    "world": "make the miniature from nothing",
    "reader": "train the network that reads pictures",
    "metrics": "print what the reader reads of true pictures, degraded ones and wrong ones",
    "entry": "show that the miniature obeys its captions and can draw an identity",
    "gate": "print what the gate sees of the word and of other tokens in long prompts",
    "domain": "train the domain of creatures, after `world`",
    "far": "print what becomes of pictures that are no creatures",
    "dial": "draw creatures at every strength of our dial, and at those of its peers",
    "composition": "draw several concepts on one model, and two or three of them in one picture",
    "composition-speed": "time what several concepts cost while a picture is made, in ComfyUI",
    "need": "print what a tune takes of memory, by base and resolution",
    "fidelity": "print how well a fidelity curve and its knee agree with the truth",
    "styles": "train a domain of drawing styles, and score what it makes of one picture",
    "e4t": "train the domains that it is measured against",
    "tower": "print what the vision tower's class tokens say of a creature",
    "all": "learning rates, all methods, the tables, `dial`, `composition`, `far` and `styles`",
    "quick": "a few other creatures in ten minutes",
    "creatures": "personalise held-out creatures, or a share of them",
    "table": "draw the table and the picture of the results",
    "help": "draw the pictures of the help pages",
    "sign": "draw the icon and the banner for the Comfy registry",
    "workflows": "run the example workflows for their pictures in the list of templates, and freeze the new ones",
}


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    chosen, rest = parser.parse_known_args()
    from headless.comfy import enter

    enter(cpu=True)
    modules = {"world": "make_world", "reader": "train_reader", "help": "help_pictures"}
    name = modules.get(chosen.command, chosen.command.replace("-", "_"))
    module = importlib.import_module(f"perfusion.bench.{name}")
    sys.argv = [f"python -m bench {chosen.command}", *rest]
    module.main()


if __name__ == "__main__":
    main()
