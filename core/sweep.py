"""One concept at many strengths, or two against each other: a MODEL and a CLIP for each picture of a comparison.

A list of strengths is written as in other XY plots, numbers and ranges in the order of the pictures:

    0, .25, .5        three strengths        0-1 [5]        five, evenly from 0 to 1
                                             0-1 (+.25)     from 0 in steps of .25, up to 1
"""

import re

from .apply import apply
from .concept import Concept

MOST = 64  # pictures in one sweep; a slip such as 0-1 (+.001) would keep the sampler busy for a day
NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
PART = re.compile(rf"{NUMBER}(?:\s*-\s*{NUMBER}\s*(?:\[\s*(\d+)\s*\]|\(\s*\+\s*{NUMBER}\s*\)))?")
WAYS = "Write numbers from 0 to 1 with commas between them, such as 0, .25, .5, .75, 1, or a range: 0-1 [5] is five " \
       "strengths from 0 to 1, 0-1 (+.25) goes in steps of .25."


def strengths_in(text: str) -> list[float]:
    """The strengths that a text lists, in its order. Raises ValueError where it lists none, or one outside 0..1."""
    found = []
    for part in text.split(","):
        said = PART.fullmatch(part.strip())
        if not said:
            raise ValueError(f"'{part.strip()}' is no strength. {WAYS}")
        first, last, count, step = said.groups()
        start = float(first)
        if last is None:
            found.append(start)
            continue
        way = float(last) - start
        if way < 0 or step and float(step) == 0 or count and int(count) < 2:
            raise ValueError(f"The range '{part.strip()}' should go up and hold two strengths or more. {WAYS}")
        many = int(count) if count else int(way / float(step) + 1.000001)  # .3 / .1 is a little less than 3
        check_number(many)
        each = way / (many - 1) if count else float(step)
        found += [round(start + each * k, 6) for k in range(many)]
    if outside := [s for s in found if s > 1]:
        raise ValueError(f"A strength lies in 0 to 1; '{text}' holds {outside[0]:g}. {WAYS}")
    return found


def check_number(pictures: int):
    """Raise ValueError where a sweep would be of more pictures than anyone looks at."""
    if pictures > MOST:
        raise ValueError(f"The sweep would make {pictures} pictures; it may make {MOST}. List fewer strengths.")


def label(concept: Concept) -> str:
    """The concept's word and strength, as `<mimi> .5`."""
    return f"{concept.word} {f'{concept.strength:g}'.removeprefix('0') or '0'}"


def sweep(model, clip, concept: Concept, strengths: str, concept_b: Concept | None, strengths_b: str) -> tuple:
    """(MODELs, CLIPs, labels), one of each for a picture; with a second concept a row for each of its strengths.

    Each is what Gate Strength and Apply give. Raises ValueError with a sentence.
    """
    columns = [concept.at(s).kept_apart(True) for s in strengths_in(strengths)]
    rows = [(concept_b.at(s).kept_apart(True),) for s in strengths_in(strengths_b)] if concept_b else [()]
    check_number(len(rows) * len(columns))
    made = []
    for row in rows:
        for column in columns:
            here, words = model, clip
            for one in (column, *row):
                here, words = apply(here, words, one)
            made.append((here, words, " · ".join(map(label, (column, *row)))))
    return tuple(map(list, zip(*made)))
