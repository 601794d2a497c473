"""Which word each place of a picture reads (apart.py), asked of ComfyUI's model once for each prompt of a run."""

from collections.abc import Callable

import torch
from torch import Tensor

from .apart import reads, weights

NAME = "perfusion_apart"  # of a Run in the host's transformer_options


class Run:
    """What a sampling run has found out: by prompt what places read. `shape` is that of its noise (m, c, h, w). Not a
    dict, because the host copies dicts for every call."""

    def __init__(self, shape: torch.Size):
        self.shape, self.read = shape, {}


def begun(executor, noise, *args, **kwargs):
    """An OUTER_SAMPLE wrapper: what a run finds out is forgotten with it."""
    # of the run alone: the host has made a copy of the options for it
    executor.class_obj.model_options.setdefault("transformer_options", {})[NAME] = Run(noise.shape)
    return executor(noise, *args, **kwargs)


def read_once(x: Tensor, places: Tensor, options: dict, diffusion_model, call: Callable[[], object]) -> Tensor | None:
    """Weights (b, j, h, w) of the words at `places` (b, n, j) in the latents x (b, c, h, w), see apart.py; where a
    prompt of the rows was not read yet, by a call of the model. None where nothing could be read.

    A call for a part of the picture, or for some pictures of a batch, is read each time: the next may be another part.
    """
    run, prompts = options.get(NAME), options.get("uuids", [])
    whole = run and x.shape == (len(prompts) * run.shape[0], *run.shape[1:])
    known = run.read if whole else {}
    if prompts and all(prompt in known for prompt in prompts):
        return torch.cat([known[prompt] for prompt in prompts])
    layers = [module for name, module in diffusion_model.named_modules()
              if "output_blocks" in name and name.endswith("attn2")]
    with reads(layers, places, x.shape[-2:]) as found:
        call()
    if not found:
        return None
    weight = weights(found)
    known.update(zip(prompts, weight.chunk(len(prompts) or 1)))
    return weight
