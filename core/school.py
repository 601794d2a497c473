"""The loop of Train Domain: steps of a `train_domain.Course`, on one process or on many, that go on where they stopped.

Everything that a step draws comes from the seed and its number alone, here and for all processes together; each takes
its share, and sees no picture of another's. So a run that was killed ends at the weights of an unbroken one, and two
processes learn what one does, to rounding.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace

import torch

from .checkpoint import Checkpoint
from .train_domain import Course

WARM_UP = 100  # steps
TURNS = 256 * math.lcm(*range(1, 17))  # divided by how many captions there are: of up to 16 each is as likely


@dataclass(frozen=True)
class Schooling:
    """Settings of a domain's training."""

    steps: int = 30000  # the paper's, for faces
    batch: int = 16  # pictures a step, of all processes together
    accumulate: int = 1  # parts in which a process learns its share of a step, to need less memory
    seed: int = 0
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Schooled:
    """What a step tells the one who watches. The numbers are means over the last steps, of all parts and processes."""

    step: int
    steps: int
    numbers: dict[str, float]
    seconds_left: float


class Diverged(ValueError):
    """Learning went wrong. What can be done depends on who asked, who adds it."""


class Alone:
    """One process: what the loop asks of accelerate's Accelerator, for hosts that have none. The loss is scaled where
    the host's UNet is in fp16, as gradients are lost in it otherwise."""

    process_index, num_processes, is_main_process = 0, 1, True

    def __init__(self, host):
        self.scaler = torch.amp.GradScaler(host.device.type, 2.0**10, enabled=host.dtype == torch.float16)

    def prepare(self, course, optimizer):
        self.optimizer = optimizer
        return course, optimizer

    def autocast(self):
        return nullcontext()

    def no_sync(self, module):
        return nullcontext()

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def move(self, optimizer):
        self.scaler.step(optimizer)
        self.scaler.update()

    def reduce(self, tensor, reduction):
        return tensor

    def clip_grad_norm_(self, parameters, longest):
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, longest)


def check(settings: Schooling, processes: int):
    """Raise ValueError where a step cannot be shared out evenly."""
    parts = processes * settings.accumulate
    if settings.steps < 1 or settings.batch < 1 or settings.accumulate < 1:
        raise ValueError(f"Training needs at least one step, a batch of one and one part; got {settings.steps} steps, "
                         f"a batch of {settings.batch} and {settings.accumulate} parts.")
    if settings.batch % parts:
        raise ValueError(f"A batch of {settings.batch} cannot be shared out evenly over {processes} processes in "
                         f"{settings.accumulate} parts each. Use a multiple of {parts}.")


def draw(settings: Schooling, step: int, count: int):
    """What a step is of: rows of `count` pictures, times in [0, 1), for each row a whole number that chooses among its
    captions, and what its noise is drawn with."""
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**63)
    rows = torch.randint(count, (settings.batch,), generator=generator)
    times = torch.rand(settings.batch, generator=generator)
    return rows, times, torch.randint(TURNS, (settings.batch,), generator=generator), generator


def train(course: Course, data, count: int, settings: Schooling, machine=None, checkpoint: Checkpoint | None = None,
          every: int = 500, report: Callable[[Schooled], None] = lambda schooled: None,
          sample: Callable[[Course, int], None] = lambda course, step: None):
    """Teach the course, in place.

    `data(rows, turns)` answers latents, weights, class tokens and captions of rows of its `count` pictures: of this
    process' share of a step. A turn is a whole number that chooses among the captions of its row.
    `checkpoint` is written each `every` steps and at the end, and gone on from where it is there. To its facts come
    the settings and the superclass, but not `accumulate`, which is of a machine. `sample` is called then too, with the
    step. Raises ValueError, Diverged among them, and the host's cancel, with the checkpoint left as it was last.
    """
    host, device = course.host, course.host.device
    machine = machine or Alone(host)
    check(settings, machine.num_processes)
    course.to(device)
    optimizer = torch.optim.AdamW(course.parameters(), weight_decay=0)
    begun = 0
    if checkpoint:
        own = {name: value for name, value in asdict(settings).items() if name != "accumulate"}
        checkpoint = replace(checkpoint, facts=own | {"superclass": course.superclass} | checkpoint.facts)
        begun = checkpoint.resume(course, optimizer, machine.scaler) if checkpoint.path.exists() else 0
    if machine.reduce(torch.tensor(float(begun), device=device), "mean") != begun:
        raise ValueError(f"A process would go on from step {begun} and another from elsewhere: they do not see one "
                         "checkpoint. Give an --out in a folder that all machines share.")
    module, optimizer = machine.prepare(course, optimizer)
    share = settings.batch // machine.num_processes
    mine = slice(machine.process_index * share, (machine.process_index + 1) * share)
    shown, clock = {}, time.monotonic()
    for step in range(begun, settings.steps):
        host.check()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1, (step + 1) / WARM_UP) * (
                0.5 + 0.5 * math.cos(math.pi * step / settings.steps))
        rows, times, turns, generator = draw(settings, step, count)
        latents, weight, seen, captions = data(rows[mine], turns[mine])
        noise = torch.randn(settings.batch, *latents.shape[1:], generator=generator)[mine]
        parts = [part.chunk(settings.accumulate) for part in (latents, weight, seen, noise, times[mine])]
        told = []
        for k, (x, w, f, e, t) in enumerate(zip(*parts)):
            lines = captions[k * len(x) : (k + 1) * len(x)]
            last = k + 1 == settings.accumulate
            x, w, f, e, t = (p.to(device) for p in (x, w, f, e, t))
            with nullcontext() if last else machine.no_sync(module), ExitStack() as undo:
                with machine.autocast():
                    loss, numbers = module(undo, x, w, f, lines, e, t)
                machine.backward(loss / settings.accumulate)
                told.append([loss.item(), *numbers.values()])
        machine.clip_grad_norm_(course.parameters(), 1.0)
        # of all processes, which so see the same and stop at the same step
        total, *means = machine.reduce(torch.tensor(told, device=device).mean(0), "mean").tolist()
        if not math.isfinite(total):
            raise Diverged(f"Training stopped at step {step + 1}: the loss is not a number.")
        machine.move(optimizer)
        optimizer.zero_grad()
        for name, value in zip(numbers, means):
            shown[name] = 0.98 * shown.get(name, value) + 0.02 * value
        done, end = step + 1, step + 1 == settings.steps
        left = (time.monotonic() - clock) / (done - begun) * (settings.steps - done)
        report(Schooled(done, settings.steps, dict(shown), left))
        if (done % every == 0 or end) and machine.is_main_process:
            if checkpoint:
                checkpoint.keep(course, optimizer, machine.scaler, done)
            sample(course, done)
