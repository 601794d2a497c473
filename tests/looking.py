"""What lives in a running ComfyUI, told from inside by two routes, which a server of the soak has as a node pack.

They look and change nothing, but that garbage is collected before it is counted.
"""

import gc
import hashlib
import os
from collections import Counter
from types import FunctionType

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

PACK = "perfusion-concepts"  # the folder that the server has the pack in; modules are named after it
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def weights(module: nn.Module) -> str:
    """One hash of a module's parameters and buffers, with their names and types."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def alive() -> dict:
    """How many objects of the pack there are by class, its functions and classes too; how many tensors, modules, clones
    of models, and weights that ask for gradients; what is on modules and clones beyond what their classes give them;
    and a hash of each model's weights."""
    from comfy.model_patcher import ModelPatcher

    gc.collect()
    ours, patched, counts, models = Counter(), Counter(), Counter(), {}
    for thing in gc.get_objects():
        kind = type(thing)
        own = issubclass(kind, (FunctionType, type))
        if PACK in str(thing.__module__ if own else kind.__module__):
            ours[kind.__name__] += 1
        counts["tensors"] += issubclass(kind, torch.Tensor)
        if issubclass(kind, nn.Module):
            counts["modules"] += 1
            patched["forward"] += "forward" in vars(thing)
            for name in HOOKS:
                patched[name] += len(getattr(thing, name) or ())
            counts["learning"] += sum(p.requires_grad for p in thing.parameters(recurse=False))
            patched["grad"] += sum(p.grad is not None for p in thing.parameters(recurse=False))
        if issubclass(kind, ModelPatcher):
            counts["patchers"] += 1
            models[id(thing.model)] = thing.model
            patched["wrappers"] += sum(len(ws) for kinds in thing.wrappers.values() for ws in kinds.values())
    for name, hooks in vars(global_hooks).items():
        if name.startswith("_global_") and name.endswith("_hooks"):
            patched[name] += len(hooks)
    return {"ours": ours, "counts": counts, "patched": +patched, "weights": sorted(map(weights, models.values()))}


def register():
    """Add the routes: GET /soak/alive; GET /soak/progress, the prompt that runs and the steps of its nodes so far."""
    from aiohttp import web
    from comfy_execution.progress import get_progress_state
    from server import PromptServer

    @PromptServer.instance.routes.get("/soak/alive")
    async def look(request):
        return web.json_response({"pid": os.getpid(), **alive()})

    @PromptServer.instance.routes.get("/soak/progress")
    async def progress(request):
        now = get_progress_state()
        return web.json_response({"prompt": now.prompt_id, "steps": {k: n["value"] for k, n in [*now.nodes.items()]}})
