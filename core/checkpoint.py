"""The checkpoint of a domain's training: what was learnt, the optimiser, how the loss is scaled in fp16, and the step.

It is all that there is. The learning rate, and the rows, times, noise and captions of a step, come from the seed and
the step's number alone (school.py `draw`), the same on every process: so the step is the place in the data and in the
schedule, and no random state of any process has to be kept. Nothing else draws: model, text encoders and tower are in
their evaluation mode, the encoder that learns has no dropout, and the VAE answers with its mode. There are no weight
offsets in it, as none are learnt here (train_domain.py).

It says what the training is of, and another training does not go on from it. How many processes there are is no part of
that.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import torch

from .file import write


@dataclass(frozen=True)
class Checkpoint:
    """A file, and what a training that goes on from it has to have in common with the one that wrote it."""

    path: Path
    facts: dict[str, str | int | float | None]  # short: hashes, not what they are of

    def keep(self, course, optimizer, scaler, step: int):
        """Write it, whole or not at all. `scaler` is none where the loss is not scaled."""
        data = io.BytesIO()
        torch.save({"course": course.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                    "scaler": scaler.state_dict() if scaler else {}, "facts": self.facts}, data)
        write(self.path, data.getvalue())

    def resume(self, course, optimizer, scaler) -> int:
        """Put its state in place and answer its step. Raises ValueError for one of another training."""
        try:
            state = torch.load(self.path, weights_only=True, map_location=course.host.device)
            before, step = state["facts"], state["step"]
        except Exception as error:  # torch raises whatever the unpickler met
            raise ValueError(f"The checkpoint {self.path} cannot be read ({error}). Remove it to begin "
                             "anew.") from error
        other = [name for name in self.facts if before.get(name) != self.facts[name]]
        if other:
            theirs, ours = (", ".join(f"{name} {facts.get(name)}" for name in other) for facts in (before, self.facts))
            raise ValueError(f"The checkpoint {self.path} is of a training with {theirs}, and {ours} was asked for. "
                             "Give the same to go on, or remove it to begin anew.")
        course.load_state_dict(state["course"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler and state["scaler"]:  # a training may go on in another precision
            scaler.load_state_dict(state["scaler"])
        return step
