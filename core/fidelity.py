"""Fidelity curve: what a concept's dial gives and what it takes, seen in pictures at several strengths, and its knee.

    a(s, p), h(s, p)    what a vision tower answers to the picture of prompt p at strength s, and the mean of its
                        tokens before its last layer;  a*: its answer to a photo
    likeness(s)  = (ā(s) − ā(0)) · (a* − ā(0)) / |a* − ā(0)|²     ā(s) = mean of a(s, p) over p, all a of length 1
    obedience(s) = [d(s) − d×] / [1 − d×]        d(s) = mean over p of cos(h(s, p), h(0, p))
                                                 d×   = mean over p ≠ q of cos(h(0, p), h(0, q))
    knee = the s at which the line of obedience falls below KEPT, and no further than where likeness is highest

Likeness is how much of the way has been gone from what the plain model draws to the photo. Obedience is measured by
what the plain model makes of the same prompt and noise: 1 is that very picture, and 0 is one that is no nearer to it
than its picture of another prompt. Both are shares, so that any tower can be asked. bench/research.md has what else was
tried, and how far the two agree with the truth (`python -m bench fidelity`).
Letters: s strengths · p prompts · m photos · w width.
"""

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise

from torch import Tensor
from torch.nn.functional import normalize

PROMPTS = (  # each asks for a way to draw, a thing and a place: easy prompts are obeyed at any strength
    "an ink drawing of a small {} in the snow",
    "a clay model of a {} wearing a crown at the beach",
    "a pastel drawing of a {} holding a balloon at night",
)
MOST = 64  # pictures
KEPT = 0.6  # of obedience, at the knee


@dataclass(frozen=True)
class Curve:
    """What was measured of a concept."""

    strengths: tuple[float, ...]  # from 0, rising
    likeness: tuple[float, ...]
    obedience: tuple[float, ...]
    tower: str  # hash of the vision tower
    prompts: tuple[str, ...]
    seed: int

    @property
    def knee(self) -> float:
        """The strength, in hundredths, up to which the prompt keeps its due; no more than has the highest likeness.

        Never 0, at which there is no concept: where every other strength costs too much it is the lowest of them.
        """
        due = likest = max(zip(self.likeness[1:], self.strengths[1:]), key=lambda at: (at[0], -at[1]))[1]
        for (s, o), (further, less) in pairwise(zip(self.strengths, self.obedience)):
            if less < KEPT:
                due = s + (further - s) * max(0.0, o - KEPT) / (o - less) if o > less else s
                break
        return round(max(min(due, likest), self.strengths[1]), 2)


def prompts_in(text: str) -> tuple[str, ...]:
    """The prompts that a text has, one on a line. Raises ValueError where they are too few or one has no {}."""
    found = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if bad := [prompt for prompt in found if "{}" not in prompt]:
        raise ValueError(f"Each prompt has to hold {{}} where the concept's word goes, such as '{PROMPTS[0]}'; got "
                         f"'{bad[0]}'.")
    if len(found) < 2:
        raise ValueError(f"A fidelity curve needs two different prompts or more, one on a line, and {len(found)} came: "
                         "obedience is how much pictures of several prompts differ. Add one, such as "
                         f"'{PROMPTS[len(found)]}'.")
    return found


def rising(strengths: list[float], prompts: int) -> tuple[float, ...]:
    """Strengths in order, each once. Raises ValueError where 0 is missing or nothing else, or pictures get too many."""
    found = tuple(sorted(set(strengths)))
    if found[0] != 0 or len(found) < 2:
        raise ValueError("The strengths of a fidelity curve begin at 0, the plain model that the others are measured "
                         f"against, and go on with one or more; got {', '.join(f'{s:g}' for s in found)}. Write for "
                         "one 0, .25, .5, .75, 1.")
    if len(found) * prompts > MOST:
        raise ValueError(f"{len(found)} strengths of {prompts} prompts are {len(found) * prompts} pictures; it may be "
                         f"{MOST}. List fewer of either.")
    return found


def likeness(answers: Tensor, photos: Tensor) -> Tensor:
    """Likeness (s) of pictures with answers (s, p, w) to photos with answers (m, w)."""
    made, photo = normalize(answers.float(), dim=-1).mean(1), normalize(photos.float(), dim=-1).mean(0)
    gone, way = made - made[0], photo - made[0]
    return gone @ way / way.square().sum().clamp_min(1e-12)


def obedience(means: Tensor) -> Tensor:
    """Obedience (s) of pictures with tokens' means (s, p, w), of two prompts or more."""
    h = normalize(means.float(), dim=-1)
    d, between, p = (h * h[0]).sum(-1).mean(1), h[0] @ h[0].T, h.shape[1]
    apart = (between.sum() - between.trace()) / (p * (p - 1))
    return (d - apart) / (1 - apart).clamp_min(1e-6)


def dumped(curve: Curve) -> str:
    """The curve as a concept's file has it."""
    return json.dumps({name: [*part] if isinstance(part, tuple) else part for name, part in asdict(curve).items()},
                      sort_keys=True)


def parsed(text: str) -> Curve:
    """The curve of such a text. Raises ValueError, KeyError or TypeError where it is damaged."""
    found = json.loads(text)
    numbers = {name: tuple(float(v) for v in found[name]) for name in ("strengths", "likeness", "obedience")}
    curve = Curve(**numbers, tower=str(found["tower"]), prompts=tuple(map(str, found["prompts"])),
                  seed=int(found["seed"]))
    s = curve.strengths
    lengths = {len(part) for part in numbers.values()}
    if len(s) < 2 or len(lengths) > 1 or s[0] != 0 or s[-1] > 1 or any(a >= b for a, b in pairwise(s)):
        raise ValueError("the fidelity curve is none")
    if not all(math.isfinite(v) for part in numbers.values() for v in part):
        raise ValueError("the fidelity curve holds values that are no numbers")
    return curve
