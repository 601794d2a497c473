"""Which word each place of a picture reads (apart.py), asked of ComfyUI's model once for each prompt of a run."""

from collections.abc import Callable

import torch
from torch import Tensor

from .apart import reads, weights

NAME = "perfusion_apart"  # of a Run in the host's transformer_options


class Run:
    """What a sampling run has found out: by prompt and size what places read. The host copies dicts for every call."""

    def __init__(self):
        self.read = {}


def begun(executor, noise, *args, **kwargs):
    """An OUTER_SAMPLE wrapper: what a run finds out is forgotten with it."""
    # of the run alone: the host has made a copy of the options for it
    executor.class_obj.model_options.setdefault("transformer_options", {})[NAME] = Run()
    return executor(noise, *args, **kwargs)


def read_once(x: Tensor, places: Tensor, options: dict, diffusion_model, call: Callable[[], object]) -> Tensor | None:
    """Weights (b, j, h, w) of the words at `places` (b, n, j) in the latents x (b, c, h, w), see apart.py; where a
    prompt of the rows was not read yet, by a call of the model. None where nothing could be read."""
    # outside of a run every call is a first one
    prompts, known = options.get("uuids") or [None], options.get(NAME, Run()).read
    keys = [(prompt, x.shape[1:]) for prompt in prompts]
    if not all(key in known for key in keys):
        layers = [module for name, module in diffusion_model.named_modules()
                  if "output_blocks" in name and name.endswith("attn2")]
        with reads(layers, places, x.shape[-2:]) as found:
            call()
        if not found:
            return None
        known |= zip(keys, weights(found).chunk(len(keys)))
    return torch.cat([known[key] for key in keys])
