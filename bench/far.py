"""`python -m bench far`: what becomes of pictures that are no members of the demo's domain.

Printed and kept in bench/results/far.json: of pictures of each superclass, the share that is taken for no creature; and
for houses that are shown as creatures, how well prompts with the word are drawn (alignment, and whether a creature
stands there at all) by what Encode Concept makes of them, by what the encoder would have said, and by the plain word.
"""

import argparse
import json
from dataclasses import replace

import torch

from ..core.encode import encode
from ..core.host_diffusers import DiffusersHost
from ..core.tower import tokens_of
from . import creatures, metrics, world
from . import reader as judge
from .examine import DEMO, PROMPTS, SUPERCLASS, WORD, miniature, ours, tower
from .table import mean_se

SHOWN, SEED, RESULTS = 300, 9, creatures.RESULTS.with_name("far.json")


def shown(kind: str, n: int):
    """n pictures (n, 3, H, W) of test identities of a superclass, and their contexts (n, c)."""
    generator = torch.Generator().manual_seed(SEED)
    context = world.contexts(n, generator, company="alone")
    return world.render(kind, world.identities(n, "test", kind, generator), context)[0], context


def read(domain, pictures):
    """Class tokens (n, l, w) of pictures (n, 3, H, W)."""
    parts = [tokens_of(tower(), part.movedim(1, -1), domain.encoder.read) for part in pictures.split(50)]
    return torch.cat(parts).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=16, help="how many houses are drawn from")
    n = parser.parse_args().n
    domain, host = creatures.domain("quick-tune"), DiffusersHost(miniature(), SUPERCLASS, DEMO)
    told = {kind: domain.members.far(read(domain, shown(kind, SHOWN)[0])).float().mean().item()
            for kind in world.SUPERCLASSES}
    print("taken for no creature:", *(f"{kind} {share:.3f}" for kind, share in told.items()), f"({SHOWN} of each)")
    houses, contexts = shown("house", n)
    rows = {}
    for k, seen in enumerate(read(domain, houses)):
        generator = torch.Generator().manual_seed(k)
        wanted = world.unlike(contexts[k : k + 1].expand(PROMPTS, -1), generator)
        wanted[:, world.COMPANY] = 0
        latents = host.latents(houses[k : k + 1].movedim(1, -1))  # BCHW -> BHWC
        made = {name: encode(host, of, seen[None], latents, SUPERCLASS, WORD) for name, of in (
            ("encoded", domain), ("without a look", replace(domain, members=None)))}
        for name in (*made, "class word"):
            applied = (made[name].at(1.0),) if name in made else ()
            lines = world.context_caption(wanted, WORD if name in made else SUPERCLASS)
            drawn = ours(host.pipe, applied, lines, [1000 * k + m for m in range(PROMPTS)]).movedim(-1, 1).cpu()
            found = judge.load().read(drawn)
            there = found.superclass[:, judge.LONE].argmax(1) == world.SUPERCLASSES.index(SUPERCLASS)
            rows.setdefault(name, []).append((metrics.alignment(found, wanted, SUPERCLASS).mean().item(),
                                              there.float().mean().item()))
    means = {name: {part: mean_se(values)[::2] for part, values in zip(("alignment", "creature"), zip(*of))}
             for name, of in rows.items()}
    for name, of in means.items():
        print(name.ljust(16), *(f"{part} {mean:.3f} ± {se:.3f}" for part, (mean, se) in of.items()), sep="  ")
    RESULTS.write_text(json.dumps({"far": told, "shown": SHOWN, "n": n, "rows": means}, indent=1) + "\n",
                       encoding="utf-8")
