"""Sampling runs of a ComfyUI model, kept with what they made, so that a map of where concepts acted finds its picture.

The host keeps results: a sampler that is queued again does not run, and one MODEL serves many samplers. So what a run
left behind is looked up by the latents that came out of it, and not by which of them ran last.
"""

from collections import deque
from dataclasses import dataclass

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .prompt import SAID
from .where import RUN, Run

KEY = "perfusion_trace"
KEPT = 32  # runs; the host keeps results of earlier queues, as many as it has memory for
SAME = 1e-2  # between latents: the host may store them in half precision


@dataclass(frozen=True)
class Acted:
    """One run: its latents (m, c, H, W), heat (m, j, H, W), and per concept its word and the words it opened for."""

    latents: Tensor
    heat: Tensor
    words: list[tuple[str, list[tuple[str, float]]]]


class Trace:
    """The last runs of a MODEL, and the wrapper that keeps them."""

    def __init__(self):
        self.runs = deque(maxlen=KEPT)

    def __call__(self, executor, noise, *args, **kwargs):
        guider = executor.class_obj
        said = {cond["uuid"]: cond[SAID] for conds in guider.conds.values() for cond in conds if SAID in cond}
        # of the run alone: the host has made a copy of the options for it
        run = guider.model_options.setdefault("transformer_options", {}).setdefault(
            RUN, Run(len(noise), noise.shape[2:], said))
        latents = executor(noise, *args, **kwargs)
        words = [(concept.word, run.words(concept)) for concept in run.concepts]
        self.runs.appendleft(Acted(latents.float().cpu(), run.heat(), words))
        return latents

    def of(self, latents: Tensor) -> Acted:
        """The run that made these latents (m, c, H, W). Raises ValueError where none did."""
        came = latents.float().cpu()
        for run in self.runs:
            if run.latents.shape == came.shape and torch.allclose(run.latents, came, SAME, SAME):
                return run
        raise ValueError(
            "No run that was traced made these latents. Connect the model of Trace Concepts to the sampler, and the "
            "sampler's first output, unchanged, to Where It Acted. If they are so connected, the run has been "
            "forgotten: change the seed and queue again."
        )


def traced(model) -> tuple:
    """(MODEL clone, Trace): what is sampled with the clone, bit for bit as with the model, leaves its runs there."""
    model, trace = model.clone(), Trace()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, trace)
    return model, trace
