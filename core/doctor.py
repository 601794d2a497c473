"""Concept Doctor: what can be said of a concept, a domain and their files, as one Markdown report to paste.

A report has sections of lines. A line that begins with WRONG needs attention, and says what to do. The doctor is asked
when something is broken, so an examination that fails is a line of the report, whatever it fails with. What is pasted
is read by others: the user's home folder is written ~.
"""

import importlib.metadata
import platform
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import concept as concepts
from . import domain as domains
from .concept import BASES, Concept
from .domain import Domain
from .encode import far

WRONG = "✗ "
PACK = Path(__file__).parent.parent / "pyproject.toml"
PACKAGES = "torch", "safetensors", "transformers"
LISTED = 20  # files of a folder that are named


def examined(examine: Callable[..., Iterable[str]], *things) -> list[str]:
    """The lines of an examination, and one more for what ended it."""
    lines = []
    try:
        lines.extend(examine(*things))
    except ValueError as error:  # a sentence of ours
        lines.append(f"{WRONG}{error}")
    except Exception as error:  # what nobody thought of is what the report is for
        lines.append(f"{WRONG}This could not be looked at ({type(error).__name__}: {error}). Report it with the rest.")
    return lines


def report(sections: Mapping[str, list[str]]) -> str:
    """The report as Markdown, without the sections that have no lines."""
    said, text = set(), ""
    for title, lines in sections.items():
        fresh = [line for line in lines if line not in said]  # one cause ends several examinations
        said |= {line for line in lines if line.startswith(WRONG)}
        if fresh:
            text += f"\n## {title}\n\n" + "".join(f"- {' '.join(line.split())}\n" for line in fresh)
    wrong = f"{len(said)} thing{'s' * (len(said) > 1)} to look at, marked {WRONG.strip()}"
    text = f"# Concept Doctor\n\n{wrong if said else 'Nothing is wrong'}.\n{text}"
    # in angle brackets a word would be a tag, and not be seen
    return without_home(re.sub(r"(?<!`)(<[^<>\s]+>)(?!`)", r"`\1`", text))


def without_home(text: str) -> str:
    """The text with ~ for the user's home folder, however its separators are written."""
    slash = r"[\\/]+"
    for home in {Path.home(), Path.home().resolve()}:
        names = [re.escape(name) for name in home.parts[1:]]
        if names:  # else home is the root, which every path begins with
            own = re.escape(home.drive) + slash + slash.join(names)
            text = re.sub(rf"(?<![\w.-]){own}(?![\w.-])", "~", text, flags=re.IGNORECASE)
    return text


def versions() -> Iterable[str]:
    """The pack's version, and those of what it runs on."""
    pack = re.search(r'^version = "(.+)"$', PACK.read_text(encoding="utf-8"), re.M)[1]
    yield f"pack {pack}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        yield f"{name} {installed(name)}"


def installed(name: str) -> str:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def numbers(tensors: Mapping[str, Tensor]) -> Iterable[str]:
    """Whether all values are numbers."""
    bad = [name for name, t in tensors.items() if not t.float().isfinite().all()]
    if bad:
        yield (f"{WRONG}{len(bad)} of {len(tensors)} tensors hold values that are not numbers (NaN or infinite), such "
               f"as {bad[0]}. Load the file again, or learn it anew with fewer steps or another seed.")
    else:
        yield f"All values of its {len(tensors)} tensors are numbers."


def of_concept(concept: Concept) -> Iterable[str]:
    """What a concept is, what it holds, and whether its gate opens."""
    yield f"`{concept.word}`, a `{concept.superclass}`, for {BASES[concept.base]} ({concept.prediction})"
    if concept.blank:
        yield f"{WRONG}{far(concept)}"
    elif concept.off:
        yield (f"{WRONG}Its strength is 0, so prompts get the word {concept.superclass} and nothing of it shows. Raise "
               "it in Gate Strength.")
    else:
        opens = torch.sigmoid(torch.tensor((1 - concept.gate_bias) / concept.temperature)).item()
        dial = f"strength {concept.strength:g}" if concept.bias is None else f"raw bias {concept.bias:g}"
        yield f"{dial}, temperature {concept.temperature:g}: at its own word {concept.scale * opens:.0%} of it acts"
        if opens < 0.5:
            yield f"{WRONG}The gate is mostly shut. Lower the bias in Gate Strength, or set its mode to slider."
    if curve := concept.fidelity:
        marks = [f"{like:.2f} / {obeys:.2f} at {s:g}"
                 for s, like, obeys in zip(curve.strengths, curve.likeness, curve.obedience)]
        yield f"fidelity curve, likeness / obedience: {', '.join(marks)}; the strength found is {curve.knee:g}"
    yield (f"{len(concept.target_output)} value outputs in {concept.precision}, a text width of "
           f"{len(concept.target_input)}, word embeddings for {', '.join(sorted(concept.embedding))}")
    tensors = {name: getattr(concept, name) for name in ("target_input", "key_input", "direction")}
    tensors |= {f"target_output.{name}": o for name, o in concept.target_output.items()}
    tensors |= {f"embedding.{name}": v for name, v in concept.embedding.items()}
    yield from numbers(tensors)
    known = {key: concept.training[key] for key in ("steps", "pictures") if key in concept.training}
    learnt = "".join(f", {n} {key.removesuffix('s' * (n == 1))}" for key, n in known.items())
    domain = f"domain `{concept.domain[:12]}`" if concept.domain else "no domain"
    yield f"caption statistics `{concept.covariance[:12]}`, {domain}{learnt}"


def of_domain(domain: Domain) -> Iterable[str]:
    """What a domain is and holds."""
    yield f"domain of `{domain.superclass}`, for {BASES[domain.base]} ({domain.prediction})"
    yield (f"{type(domain.encoder).__name__} with {len(domain.offsets)} weight offsets, vision tower "
           f"`{domain.tower[:12]}`")
    offsets = {f"offset.{name}.{part}": getattr(o, part) for name, o in domain.offsets.items() for part in o._fields}
    yield from numbers({f"encoder.{name}": t for name, t in domain.encoder.state_dict().items()} | offsets)


def of_file(path: Path) -> Iterable[str]:
    """What a file is, and what it holds. Raises ValueError where it is neither a concept nor a domain."""
    learnt = opened(path)
    yield f"{path.stat().st_size / 1024:.1f} KB"
    yield from (of_concept if isinstance(learnt, Concept) else of_domain)(learnt)


def opened(path: Path) -> Concept | Domain:
    """The concept or the domain in a file. Raises ValueError with a sentence where there is none."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Check its name, and whether a link leads nowhere.")
    try:
        if zipfile.is_zipfile(path):
            raise ValueError(f"'{path.name}' is an archive of torch.save, and not a .safetensors. Files of the public "
                             "Perfusion and E4T programs go through `python -m headless convert` first.")
        return (domains if kind_of(path) == domains.FORMAT else concepts).load(path)
    except OSError as error:
        raise ValueError(f"'{path.name}' cannot be read ({error.strerror}). Allow reading it, or copy it to another "
                         "disk.") from error


def kind_of(path: Path) -> str:
    """The format that a .safetensors names in its header, or nothing."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format", "")
    except SafetensorError:
        return ""


def of_folders(kind: str, found: Mapping[Path, list[Path]]) -> Iterable[str]:
    """Which files of a kind ("concept", "domain") were found where, and which concepts among them do not load."""
    for folder, files in found.items():
        names = ", ".join(f"`{file.name}`" for file in files[:LISTED]) + ", …" * (len(files) > LISTED)
        there = f"{len(files)} {kind}{'s' * (len(files) != 1)}{': ' * bool(files)}{names}"
        yield f"{folder}: {there if folder.is_dir() else 'no such folder yet'}"
        for file in files if kind == "concept" else ():  # a domain may have 400 MB: Load Domain reads it
            yield from examined(loads, file)


def loads(path: Path) -> Iterable[str]:
    """Nothing, of a concept's file that loads. Raises ValueError."""
    opened(path)
    return ()
