"""Quick Tune: one picture in, a concept out (Perfusion, arXiv 2305.01644, §4; spec of the sources in the README).

Learnt are the word embedding v* and one value output o* per projection. Keys are locked to the superclass and C, i* and
every weight stay out of reach of the gradient. i* follows the encoding of the word in prompts: i* ← .99 i* + .01
mean(encode(frames(v*))), once per optimiser step, a few frames at a time. Frames are captions of all kinds with the
word where their thing is. The templates that are learnt with are short, and where i* was their mean, as in the paper,
the word's similarity in longer prompts is .41 in the median instead of .95 and keeps the gate shut (`bench gate`).

    e = encode(templates(v*))             once per step, one backward through the text encoder
    for each of the batch: loss = Σ m (ε̂ − ε)² / Σ m     gradients add up; memory is that of one picture
    AdamW: {o*: lr .3}, {v*: lr .002}     no weight decay; the paper has .03 and .006
    from an earlier concept: {o*: lr ρ RMS(o*)}, {v*: lr ρ' RMS(v*)}      n steps move it by n ρ of its size at most

With the paper's rates more is learnt by the embedding, which reaches every later word and learns what else is in the
picture; values act at the word alone. Figures are in bench/research.md.

Letters: b batch · n tokens · m pictures · d text width · c h w latent.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import key_lock
from .concept import Concept, check_word
from .host import Host

TEMPLATES = (
    "a photo of a {}", "a good photo of a {}", "the photo of a {}", "a good photo of the {}", "image of a {}",
    "image of the {}", "a photograph of {}", "a {} shown in a photo", "a photo of {}",
)
SMALLEST = 64  # pixels a side, of pictures and of what is trained on
EMA = 0.99
FRAMES = 4  # that i* is moved by in a step
GOLDEN = 0.6180339887498949
STEPS, STEPS_FROM_CONCEPT = 50, 5  # that are advised from the superclass word, and from what a domain encoded


@dataclass(frozen=True)
class Tuning:
    """Settings of one tune."""

    steps: int = STEPS
    batch: int = 4
    seed: int = 0
    resolution: int = 512  # pixels: the square root of the area that a picture is scaled to
    mirror: bool = False
    learning_rate: float = 0.3  # of the value outputs
    embedding_learning_rate: float = 0.002
    trust: float = 0.03  # ρ and, below, ρ': in the place of both rates where an earlier concept is gone on from
    embedding_trust: float = 0.003
    templates: tuple[str, ...] = TEMPLATES


@dataclass(frozen=True)
class Progress:
    """What a step tells the one who watches."""

    step: int  # steps done
    steps: int
    losses: list[float]
    seconds_left: float
    concept: Concept  # as it is after this step


class Diverged(ValueError):
    """Learning went wrong; the last good concept was handed to `keep`."""


def check(images: Tensor | None, mask: Tensor | None, settings: Tuning):
    """Raise ValueError with a sentence for input that cannot be learnt from."""
    if images is None or len(images) == 0:
        raise ValueError("A picture of the thing is needed, and none came. Connect Load Image.")
    _, height, width, channels = images.shape
    if channels != 3:
        raise ValueError(
            f"The picture has {channels} channels and 3 were expected (RGB). Put Split Image with Alpha behind it. Its "
            "mask is white where nothing is: put Invert Mask behind that if the background should not be learnt."
        )
    if min(height, width) < SMALLEST:
        raise ValueError(f"The picture is {width}×{height} pixels; it needs at least {SMALLEST} on each side.")
    if settings.steps < 1 or settings.batch < 1:
        raise ValueError(f"Quick Tune needs at least one step and a batch of one; got {settings.steps} steps and a "
                         f"batch of {settings.batch}.")
    if settings.resolution < SMALLEST:
        raise ValueError(f"The resolution is {settings.resolution}; it has to be at least {SMALLEST} pixels.")
    bad = [t for t in settings.templates if t.count("{}") != 1]
    if bad or not settings.templates:
        raise ValueError("Each caption has to hold {} exactly once, where the concept's word goes, such as "
                         f"'a photo of a {{}}'; got '{bad[0] if bad else 'no caption'}'.")
    if mask is not None:
        if mask.shape[1:] != images.shape[1:3] or len(mask) not in (1, len(images)):
            raise ValueError(
                f"The mask is {'×'.join(map(str, mask.shape[:0:-1]))} ({len(mask)}), the picture {width}×{height} "
                f"({len(images)}). They have to be of one size: use the mask of the same Load Image, or disconnect it "
                "(a picture without transparency comes with an empty 64×64 mask)."
            )
        if (mask.flatten(1).amax(1) <= 0).any():
            raise ValueError("The mask is empty, so there is nothing to learn from. Paint the thing, or disconnect it.")


def advised(start: Concept | None) -> int:
    """How many steps are worth it, from the superclass word or from an earlier concept."""
    return STEPS_FROM_CONCEPT if start and not start.blank else STEPS


def fit(images: Tensor, resolution: int) -> Tensor:
    """Images or masks (m, H, W, k) scaled, shape kept, to an area of about resolution², sides multiples of 64."""
    _, height, width, _ = images.shape
    scale = resolution / (height * width) ** 0.5
    size = [max(SMALLEST, round(side * scale / 64) * 64) for side in (height, width)]
    images = images.movedim(-1, 1).float()  # BHWC -> BCHW
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1).movedim(1, -1)


def schedule(settings: Tuning, pictures: int, generator: torch.Generator):
    """For every step a batch of (picture, template, time).

    Times advance by the golden ratio from a random start, so any run of them, however short, is spread evenly
    over [0, 1); pictures and templates take turns in a shuffled order.
    """
    n = settings.steps * settings.batch
    times = (torch.rand((), generator=generator, dtype=torch.float64) + GOLDEN * torch.arange(n)) % 1
    turns = [torch.cat([torch.randperm(k, generator=generator) for _ in range(n // k + 1)])[:n].tolist()
             for k in (pictures, len(settings.templates))]
    samples = list(zip(*turns, times.tolist()))
    return [samples[i : i + settings.batch] for i in range(0, n, settings.batch)]


def tune(
    host: Host,
    images: Tensor,
    superclass: str,
    word: str,
    settings: Tuning = Tuning(),
    mask: Tensor | None = None,
    start: Concept | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    keep: Callable[[Concept], str] = lambda concept: "no file",
    tight: bool = False,
) -> Concept:
    """Learn a concept from images (m, H, W, 3) in 0..1 and optionally masks (m or 1, H, W).

    `start` goes on from an earlier concept, unless it is blank: then all is as without it. `report` hears of every
    step. Whatever ends the loop early (a cancel, an error, divergence), the last good concept goes to `keep`, which
    answers where it put it, and the model is left as it was. Not so where memory runs out, unless it was `tight`
    already, with as little as can be: then it can be begun once more (once_more.py). Raises ValueError for bad input
    and Diverged. The same seed on the same machine gives the same concept.
    """
    check(images, mask, settings)
    check_word(word)
    superclass, start = superclass.strip(), None if start and start.blank else start
    embedding = start.embedding if start else host.embedding(superclass)
    C_inv, covariance, statistics = host.inverse_covariance()
    images = fit(images, settings.resolution)
    weight = torch.ones_like(images[..., :1]) if mask is None else fit(
        mask[..., None].expand(len(images), -1, -1, -1), settings.resolution)
    if settings.mirror:
        images, weight = torch.cat([images, images.flip(2)]), torch.cat([weight, weight.flip(2)])
    latents = host.latents(images)
    weight = F.interpolate(weight.movedim(-1, 1), latents.shape[2:], mode="area")  # BHWC -> BCHW, image -> latent
    generator = torch.Generator().manual_seed(settings.seed)

    def concept(losses) -> Concept:
        tail = min(5, len(losses))
        facts = {name: value for name, value in asdict(settings).items() if name != "templates"} | statistics | {
            "steps": len(losses), "pictures": len(images), "mask": mask is not None,
            "templates": len(settings.templates),
            "loss": [round(sum(part) / tail, 6) for part in (losses[:tail], losses[-tail:])],
        }
        return Concept(base=host.base, prediction=host.prediction, superclass=superclass, word=word,
                       covariance=covariance, domain=start.domain if start else "", training=facts,
                       **lesson.learnt())

    def rehearsal():
        rehearse(host, superclass, word, embedding, C_inv, settings, start, latents[:1])

    with host.training(latents[:1], tight, rehearsal):
        # clones: what was made under the host's inference mode cannot be saved for the way back
        latents, weight = latents.clone().to(host.device), weight.clone().to(host.device)
        lesson = Lesson(host, superclass, word, embedding, C_inv, settings, start)
        losses, begun, last_good = [], time.monotonic(), None
        try:
            for sample in schedule(settings, len(latents), generator):
                losses.append(lesson.step(latents, weight, sample, generator))
                trouble = what_is_wrong(losses, max(5, 24 // settings.batch)) or lesson.what_is_wrong()
                if trouble:
                    raise Diverged(f"Learning stopped at step {len(losses)} of {settings.steps}: {trouble}.")
                last_good = concept(losses)
                left = (time.monotonic() - begun) / len(losses) * (settings.steps - len(losses))
                report(Progress(len(losses), settings.steps, losses[:], left, last_good))
        except BaseException as error:
            if isinstance(error, host.out_of_memory) and not tight:
                raise
            kept = f"The last good concept is kept in {keep(last_good)}." if last_good else "There is none to keep yet."
            if isinstance(error, Diverged):
                error.args = (f"{error} {kept} Queue again with fewer steps or a larger batch; if it stops at the "
                              "first step, the model or the VAE gives NaN by itself.",)
            raise
        return last_good


def what_is_wrong(losses: list[float], window: int = 5) -> str:
    """Why these losses say that learning failed, or nothing.

    Means over `window` steps are compared, which hold 20 samples or more: the loss of a photograph falls tenfold from
    the lowest noise to the highest, and fewer samples can differ by that much with nothing wrong.
    """
    if not math.isfinite(losses[-1]):
        return "the loss is not a number"
    early, late = sum(losses[:window]) / window, sum(losses[-window:]) / window
    if len(losses) >= 2 * window and late > 4 * early:
        return f"the loss has grown from {early:.3f} to {late:.3f}"
    return ""


def rehearse(host: Host, superclass: str, word: str, embedding: dict[str, Tensor], C_inv: Tensor, settings: Tuning,
             start: Concept | None, latents: Tensor):
    """A lesson's beginning and its first step on latents (1, c, h, w), by which a host knows what a tune takes: of all
    its batch one sample is enough, because what one has taken is given back before the next."""
    lesson, latents = Lesson(host, superclass, word, embedding, C_inv, settings, start), latents.clone().to(host.device)
    sample = [(0, k % len(settings.templates), 0.5) for k in range(settings.batch)]
    context, leaf = lesson.read(sample)
    with key_lock.edited(host.projections, lesson.edit()) as meet:
        lesson.look(latents, torch.ones_like(latents[:, :1]), sample, 0, leaf, meet, torch.Generator())
    lesson.move(context, leaf)


@torch.no_grad()
def each_at_the_word(host: Host, word: str, embedding: dict[str, Tensor], frames: list[str]) -> Tensor:
    """The encodings (p, d) of a word, with this embedding, in p frames, which have {} where it goes."""
    context, at = host.encode([frame.replace("{}", word) for frame in frames], word, embedding)
    return context[torch.arange(len(at)), at].float()


def at_the_word(host: Host, word: str, embedding: dict[str, Tensor], frames: list[str]) -> Tensor:
    """The mean (d) of `each_at_the_word`."""
    return each_at_the_word(host, word, embedding, frames).mean(0)


def told(sample) -> list[int]:
    """The templates of a batch of (picture, template, time), each once: a large one encodes no more than there are."""
    return sorted({template for _, template, _ in sample})


class Lesson:
    """What is being learnt, and one step of learning it. `embedding` is where v* starts (d of each text encoder), C_inv
    is (d, d) in fp64, and `start` an earlier concept to go on from."""

    def __init__(self, host: Host, superclass: str, word: str, embedding: dict[str, Tensor], C_inv: Tensor,
                 settings: Tuning, start: Concept | None):
        self.host, self.superclass, self.word, self.C_inv, self.settings = host, superclass, word, C_inv, settings
        self.embedding = {name: v.clone().to(host.device).requires_grad_() for name, v in embedding.items()}
        self.frames, self.turn = host.frames() or list(settings.templates), 0
        values = {name: module for name, module in host.projections.items() if name.endswith("to_v")}
        if start:
            self.target_input, self.key_input, outputs = start.target_input, start.key_input, start.target_output
        else:
            self.target_input = self.key_input = mean = at_the_word(host, word, self.embedding, self.frames)
            with torch.no_grad():
                outputs = {name: module(mean[None].to(host.dtype))[0] for name, module in values.items()}
        self.target_input, self.key_input = (i.clone().to(host.device) for i in (self.target_input, self.key_input))
        self.target_output = {name: o.float().to(host.device)[None].clone().requires_grad_()
                              for name, o in outputs.items()}
        learnt = [(o, settings.learning_rate, settings.trust) for o in self.target_output.values()]
        learnt += [(v, settings.embedding_learning_rate, settings.embedding_trust) for v in self.embedding.values()]
        self.optimizer = torch.optim.AdamW([
            {"params": [t], "lr": trust * t.detach().square().mean().sqrt().item() if start else rate}
            for t, rate, trust in learnt], weight_decay=0)
        self.scaler = torch.amp.GradScaler(host.device.type, 2.0**10, enabled=host.dtype == torch.float16)

    def edit(self) -> key_lock.Edit:
        """The edit of a prompt that holds the word, with the gate that the paper trains with."""
        one = torch.ones(1, 1, device=self.host.device)
        direction, _ = key_lock.direction(self.C_inv, self.target_input.cpu())
        return key_lock.Edit(
            self.target_input[None], self.key_input[None], direction.float().to(one.device)[None],
            one[0] * key_lock.TRAIN_BIAS, one[0] * key_lock.TRAIN_TEMPERATURE, self.target_output,
            present=one, joint=one.expand(2, 1, 1),
        )

    def step(self, latents: Tensor, weight: Tensor, sample, generator: torch.Generator) -> float:
        """One optimiser step over a batch of (picture, template, time); the mean loss."""
        context, leaf = self.read(sample)
        with key_lock.edited(self.host.projections, self.edit()) as meet:
            losses = [self.look(latents, weight, sample, k, leaf, meet, generator) for k in range(len(sample))]
        self.move(context, leaf)
        return sum(losses)

    def read(self, sample) -> tuple[Tensor, Tensor]:
        """The encodings (c, n, d) of a batch's templates with the word in them, each once, in order, and a leaf of the
        same that gathers the gradients to them."""
        templates = [self.settings.templates[k].replace("{}", self.word) for k in told(sample)]
        context, _ = self.host.encode(templates, self.word, self.embedding)
        return context, context.detach().requires_grad_()

    def look(self, latents: Tensor, weight: Tensor, sample, k: int, leaf: Tensor, meet, generator) -> float:
        """The gradients of the k-th of a batch, and its part of the mean loss."""
        host, (picture, template, t) = self.host, sample[k]
        host.check()
        x, m = latents[picture : picture + 1], weight[picture : picture + 1]
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        at = told(sample).index(template)
        row = leaf[at : at + 1].to(host.dtype)
        meet(row)
        errors = host.errors(x, noise, torch.tensor([t], device=x.device), row,
                             self.settings.templates[template].replace("{}", self.superclass))
        loss = (m * errors).mean(1).sum() / m.sum() / len(sample)
        self.scaler.scale(loss).backward()
        return loss.item()

    def move(self, context: Tensor, leaf: Tensor):
        """Bring the gradients of a batch home through the text encoder, and move what is learnt by them."""
        context.backward(leaf.grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        turn = [self.frames[(self.turn + k) % len(self.frames)] for k in range(FRAMES)]
        self.turn += FRAMES
        now = at_the_word(self.host, self.word, self.embedding, turn)
        self.target_input = EMA * self.target_input + (1 - EMA) * now

    def what_is_wrong(self) -> str:
        """Why what was learnt is no longer usable, or nothing. The file is in fp16."""
        learnt = [*self.embedding.values(), *self.target_output.values(), self.target_input]
        fits = all(t.half().isfinite().all() for t in learnt)
        return "" if fits else "what was learnt is no longer a number that a file could hold"

    def learnt(self) -> dict:
        """The tensors of the concept as they are now, as copies in fp32 on the CPU."""
        direction, energy = key_lock.direction(self.C_inv, self.target_input.cpu())
        return {
            "embedding": {name: v.detach().cpu().clone() for name, v in self.embedding.items()},
            "target_input": self.target_input.cpu(), "key_input": self.key_input.cpu(), "direction": direction.float(),
            "target_output": {name: o.detach()[0].cpu().clone() for name, o in self.target_output.items()},
            "energy": energy,
        }
