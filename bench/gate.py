"""How similar is the concept's word to itself, and are other tokens to it, in the bench's prompts? What the gate sees.

i* is the mean of the superclass word's encodings over the short templates, as published, or over the frames; nothing
is learnt yet. Quantiles over the prompts of dev creatures.
"""

import argparse

import torch

from ..core.host_diffusers import DiffusersHost
from ..core.key_lock import direction
from ..core.tune import TEMPLATES, at_the_word
from . import world
from .examine import DEMO, SUPERCLASS, WORD, creature, miniature

CREATURES, AFTER = 16, 12  # dev creatures; tokens looked at behind the word
QUANTILES = 0, 0.1, 0.5, 0.9, 1


@torch.no_grad()
def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    host = DiffusersHost(miniature(), SUPERCLASS, DEMO)
    C_inv, _, _ = host.inverse_covariance()
    vector = host.embedding(SUPERCLASS)
    prompts = [prompt for k in range(CREATURES) for prompt in world.context_caption(creature("dev", k)[2], WORD)]
    x, at = host.encode(prompts, WORD, vector)
    print("similarity".ljust(34), *(f"{q:>6.0%}" for q in QUANTILES))
    for name, frames in ("templates", TEMPLATES), ("frames", host.frames()):
        toward, _ = direction(C_inv, at_the_word(host, WORD, vector, frames))
        s = x @ toward.float()
        rows = list(zip(s, at.tolist()))
        parts = {"the word": torch.stack([row[k] for row, k in rows]),
                 "before it": torch.cat([row[1:k] for row, k in rows]),
                 f"the {AFTER} after it": torch.cat([row[k + 1 : k + 1 + AFTER] for row, k in rows])}
        for part, values in parts.items():
            found = values.quantile(torch.tensor(QUANTILES, dtype=s.dtype))
            print(f"i* of {name}: {part}".ljust(34), *(f"{v:6.2f}" for v in found))
