"""Train the reader on pictures of the world, most of them degraded, and some as the autoencoder gives them back.

What it is to believe of a factor is fitted by the score that is proper for it: cross-entropy for classes, squared error
for points on a circle and for lengths, and for a length's doubt the size of its own error.
"""

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from . import mini_data, mini_loop, world
from .degrade import degraded
from .reader import BELIEF, LEFT, NAMED, RIGHT, SPANS, VALUES, WEIGHTS, Reader, embed, reading

WORK = Path(__file__).resolve().parent.parent / "build" / "world"
SHARDS, STEPS, BATCH, LR = 40, 6000, 48, 1.5e-3
SHARES = torch.tensor([.4, .3, .3])  # of the superclasses


def factor_loss(superclass, raw, identity):
    """The mean loss of the raw factors (n, e) of subjects of one superclass."""
    total = 0
    true = embed(superclass, identity)
    for k, (factor, (at, end)) in enumerate(zip(world.FACTORS[superclass], SPANS[superclass])):
        x, y = raw[:, at:end], true[:, at:end]
        if factor.kind == "categorical":
            total = total + F.cross_entropy(x, identity[:, k].long())
        elif factor.kind == "circular":
            total = total + 2 * (x - y).square().sum(1).mean()
        else:
            off = (x[:, 0] - y[:, 0]).square()
            missed = 4 * (x[:, 0].detach().clamp(0, 1) - y[:, 0]).square()  # cut off any lower, it would belittle doubt
            total = total + 24 * off.mean() + .2 * F.binary_cross_entropy_with_logits(x[:, 1], missed)
    return total / len(SPANS[superclass])


def loss(reader, data):
    """The loss of a step, as `mini_loop.train` asks for it."""
    odds = SHARES[data["superclass"]] / data["superclass"].bincount()[data["superclass"]]

    def step(generator):
        rows = torch.multinomial(odds, BATCH, replacement=True, generator=generator)
        context, kinds, who = (data[name][rows] for name in ("context", "superclass", "identity"))
        with torch.no_grad():
            x = data["pictures"][rows].float() / 255
            with torch.autocast(x.device.type, enabled=False):
                x = degraded(x, context, generator)
        subjects, scene, _ = reader(x)
        # every reading of a lone subject is of it; a lone reading of two is of the first, as far as that can be told
        two = (context[:, world.COMPANY] == world.TWO)[:, None]
        other = (two & (torch.arange(3) == LEFT + RIGHT - reading(context)[:, None])).flatten()
        raw = subjects.flatten(0, 1)
        kinds = torch.where(other, data["second_superclass"][rows].repeat_interleave(3), kinds.repeat_interleave(3))
        who = torch.where(other[:, None], data["second_identity"][rows].repeat_interleave(3, 0),
                          who.repeat_interleave(3, 0))
        factors = 0
        for k, name in enumerate(world.SUPERCLASSES):
            of = (kinds == k).nonzero()[:, 0]
            if len(of):
                part = factor_loss(name, raw[of, 3 + k * BELIEF:3 + (k + 1) * BELIEF], who[of])
                factors = factors + part * len(of) / len(kinds)
        kind = F.cross_entropy(raw[:, :3], kinds)
        columns = sum(F.cross_entropy(part, context[:, k]) for k, part in zip(NAMED, scene.split(VALUES, 1)))
        columns = columns / len(NAMED)
        return 3 * factors + .5 * kind + columns, {
            "factors": factors.item(), "kind": kind.item(), "context": columns.item()}

    return step


@torch.no_grad()
def settle(reader, data, steps=60):
    """Measure the statistics of the normalisations anew: the loop averages weights, and theirs were another's."""
    norms = [layer for layer in reader.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the steps
    step = loss(reader.train(), data)
    for k in range(steps):
        step(torch.Generator().manual_seed(k))
    reader.eval()


def main():
    """Train, or go on from the last checkpoint, and write WEIGHTS."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    reader, data = Reader(), mini_data.load(WORK / "pictures", SHARDS)
    for path in (WORK / "decoded").glob("*.safetensors"):
        k, decoded = int(path.stem), safetensors.torch.load_file(path)["pictures"]
        data["pictures"][k * mini_data.SHARD : (k + 1) * mini_data.SHARD] = decoded
    mini_loop.train("reader", WORK, reader, loss(reader, data), STEPS, LR, seed=7)
    if mini_loop.RANK == 0:
        settle(reader, data)
        safetensors.torch.save_file(
            {k: t.half().contiguous() if t.ndim > 1 else t for k, t in reader.state_dict().items()
             if "num_batches" not in k}, WEIGHTS)
