"""What do the tower's class tokens, which an encoder reads, say of a creature that the tower was not trained on?

Ridge regression to the columns of `reader.embed`, on the tokens and an intercept. Printed are the share of a factor's
variance that is read, and of a class how often the right one is the largest. Letters: m pictures · l tokens · w width.
"""

import argparse

import torch

from ..core.encoder import Encoder
from ..core.tower import tokens_of
from . import world
from .examine import SUPERCLASS, tower
from .reader import SPANS, embed

TRAINED, TESTED, SEED, RIDGE = 3000, 600, 5, 30.0


def shown(split: str, n: int, generator):
    """Class tokens (n, l·w) of creatures of a split, alone, and their identities as certain beliefs (n, e)."""
    who, context = world.identities(n, split, SUPERCLASS, generator), world.contexts(n, generator, company="alone")
    pictures = torch.cat([world.render(SUPERCLASS, a, b)[0] for a, b in zip(who.split(100), context.split(100))])
    return tokens_of(tower(), pictures.movedim(1, -1), Encoder.read).flatten(1), embed(SUPERCLASS, who)  # BCHW -> BHWC


@torch.no_grad()
def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    (x, y), (x_test, y_test) = (shown(*of, generator) for of in (("train", TRAINED), ("test", TESTED)))
    mean, spread = x.mean(0), x.std(0)
    A, B = (torch.cat([(t - mean) / spread, torch.ones(len(t), 1)], 1) for t in (x, x_test))
    read = B @ torch.linalg.solve(A.T @ A + RIDGE * torch.eye(A.shape[1]), A.T @ y)
    print("factor".ljust(16), "variance   right  chance")
    for factor, (at, end) in zip(world.FACTORS[SUPERCLASS], SPANS[SUPERCLASS]):
        found, true = read[:, at:end], y_test[:, at:end]
        share = 1 - (found - true).square().sum() / (true - y[:, at:end].mean(0)).square().sum()
        right = ""
        if factor.kind == "categorical":
            right = f"{(found.argmax(1) == true.argmax(1)).float().mean():8.2f}{1 / (end - at):8.2f}"
        print(factor.name.ljust(16), f"{share:8.2f}{right}")
