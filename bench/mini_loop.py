"""One training loop for all the small networks: AdamW, warm-up and cosine, an average of the weights, and checkpoints.

It goes on from its last checkpoint. On a CPU it runs as several processes of one thread each whose gradients are
averaged: on small networks that beats one process of several threads, by far when the machine is busy.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

WARM_UP = 200  # steps
DECAY = 0.999  # of the average of the weights
EVERY = 250  # steps between checkpoints
RANK, WORKERS = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))


def train(name: str, folder: Path, module: nn.Module, loss: Callable, steps: int, lr: float, seed: int,
          stop: int | None = None, amp: bool = True) -> nn.Module:
    """Train `module` in place and return it with its averaged weights.

    `loss` gets a generator of this step and worker and answers a scalar, or (scalar, {name: number to show}).
    `stop`: leave early, at a checkpoint, to go on another time.
    """
    path = folder / f"{name}.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = [p.detach().clone() for p in parameters]
    begun = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, begun = state["average"], state["step"]
    if WORKERS > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    shown = {}
    bar = tqdm(range(begun, steps if stop is None else stop), name, initial=begun, total=steps, disable=RANK > 0,
               mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + RANK)
        device = parameters[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            out = loss(generator)
        out, numbers = out if isinstance(out, tuple) else (out, {})
        out.backward()
        if WORKERS > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters]) / WORKERS
            dist.all_reduce(flat)
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(DECAY, (step + 1) / (step + 10)))
        for key, value in {"loss": out.item(), **numbers}.items():
            shown[key] = 0.98 * shown.get(key, value) + 0.02 * value
        if RANK == 0:
            bar.set_postfix({key: f"{value:.4f}" for key, value in shown.items()}, refresh=False)
        if RANK == 0 and ((step + 1) % EVERY == 0 or step + 1 == steps):
            part = path.with_suffix(".part")
            torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average,
                        "step": step + 1}, part)
            part.replace(path)
    with torch.no_grad():
        for p, a in zip(parameters, average):
            p.copy_(a)
    return module
