"""Domain: what a family of things has in common, learnt once: E4T's encoder and weight offsets, and their file.

The file is one .safetensors in fp16 with `encoder.<layer>.weight` and `.bias`, in domains from public E4T files
`offset.<attention weight>.output` and `.input` as well, `members.mean`, `.factor` and `.limit` where it is known what
its pictures look like, and string metadata. SD1.5 with CLIP-ViT-H-14: 86 MB, and 435 MB of public files. It serves
learning; a concept applies without it, and names by its hash the domain it was learnt with.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from .concept import BASES
from .encoder import Encoder
from .file import brief, pack, unpacked, write
from .members import Members
from .public_encoder import PublicEncoder
from .weight_offset import Offset

FORMAT = "perfusion-domain/1"
LARGEST = 512 * 2**20  # bytes; SDXL with ViT-bigG has some 310 MB
TENSOR = re.compile(r"encoder\.(tower(\.\d+)?|unet|join|ln_post|out\.clip_[lgh]|values\..+\.to_v)\.(weight|bias)|"
                    r"offset\..+\.(output|input)|members\.(mean|factor|limit)")
VALUE = re.compile(r"(?<=^values\.).+(?=\.(weight|bias)$)")  # the projection, in which the encoder has no dots
AGAIN = "Load another file, or train the domain again."


@dataclass(frozen=True)
class Domain:
    """What was learnt of a family. Nothing may change its tensors: they are shared."""

    base: str  # a key of concept.BASES
    prediction: str  # "eps" or "v"
    superclass: str  # the word that the encoder's answers are offsets of
    tower: str  # hash of the vision tower that the encoder reads
    encoder: Encoder | PublicEncoder  # on the CPU, in fp32
    offsets: dict[str, Offset]  # attention weight, by the name that files have -> its factors
    training: dict = field(default_factory=dict)
    members: Members | None = None  # what its pictures look like; unknown of public files, and of few pictures

    @cached_property  # to pack 435 MB takes seconds; a `replace`d domain computes its own
    def hash(self) -> str:
        """Hex SHA-256 of the file, by which a concept names its domain."""
        return hashlib.sha256(dump(self)).hexdigest()


def dump(domain: Domain) -> bytes:
    """The file's bytes. Raises ValueError where a value is no fp16 number."""
    tensors = {f"encoder.{name.replace('/', '.')}": t for name, t in domain.encoder.state_dict().items()}
    for name, offset in domain.offsets.items():
        tensors |= {f"offset.{name}.output": offset.output, f"offset.{name}.input": offset.input}
    if domain.members:
        tensors |= {f"members.{name}": t for name, t in domain.members._asdict().items()}
    tensors = {name: t.detach().half().cpu() for name, t in tensors.items()}
    bad = [name for name, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise ValueError(f"'{bad[0]}' holds values that a domain's file cannot (NaN, infinite or beyond 65504): "
                         "training diverged. Nothing was saved. Train it again with a larger batch, or by `python -m "
                         "headless train-domain` at lower learning rates.")
    metadata = {name: getattr(domain, name) for name in ("base", "prediction", "superclass", "tower")}
    return pack(tensors, {"format": FORMAT, **metadata, "training": json.dumps(domain.training, sort_keys=True)})


def parse(data: bytes, name: str) -> Domain:
    """The domain that a file's bytes hold; `name` is for messages. Raises ValueError with a sentence."""
    tensors, metadata = unpacked(data, name, AGAIN)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"'{name}' is not a domain of this pack: its format should be {FORMAT}, it is "
            f"{brief(metadata.get('format', 'not given'))}. A concept goes into Load Perfusion Concept."
        )
    try:
        facts = {key: metadata[key] for key in ("base", "prediction", "superclass", "tower")}
        facts["training"] = json.loads(metadata["training"])
        if not isinstance(facts["training"], dict):
            raise ValueError(f"training is a {type(facts['training']).__name__}, facts by name were expected")
        if facts["base"] not in BASES or facts["prediction"] not in ("eps", "v") or not facts["superclass"]:
            raise ValueError("a value is out of range")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"The facts stored in '{name}' are damaged ({brief(error)}). {AGAIN}") from error
    return Domain(encoder=_encoder(tensors, name), offsets=_offsets(tensors, name), members=_members(tensors, name),
                  **facts)


def _encoder(tensors: dict[str, Tensor], name: str) -> Encoder | PublicEncoder:
    """The encoder with the shapes that its own tensors have."""
    unknown = [key for key in tensors if not TENSOR.fullmatch(key)]
    # in fp32, as torch cannot ask eight bits whether they are finite
    bad = [key for key, t in tensors.items() if not t.is_floating_point() or not t.float().isfinite().all()]
    if unknown or bad:
        raise ValueError(f"'{name}' holds unknown {brief(unknown or 'nothing')} and no numbers in "
                         f"{brief(bad or 'none')}. {AGAIN}")
    state = {key.removeprefix("encoder."): t.float() for key, t in tensors.items() if key.startswith("encoder.")}
    state = {VALUE.sub(lambda found: found[0].replace(".", "/"), key): t for key, t in state.items()}
    kind = PublicEncoder if "ln_post.weight" in state else Encoder
    try:
        encoder = kind.of(state)
        if not encoder.out:
            raise ValueError("no text encoder is answered")
    except (KeyError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"The encoder in '{name}' is damaged ({brief(error)}). {AGAIN}") from error
    return encoder


def _offsets(tensors: dict[str, Tensor], name: str) -> dict[str, Offset]:
    keys = sorted({key.rpartition(".")[0] for key in tensors if key.startswith("offset.")})
    offsets = {}
    for key in keys:
        factors = [tensors.get(f"{key}.{part}") for part in ("output", "input")]
        if any(t is None or t.ndim != 2 for t in factors) or [len(t) for t in factors] != [3, 2]:
            raise ValueError(f"'{brief(key)}' in '{name}' should be factors (3, d_out) and (2, d_in). {AGAIN}")
        offsets[key.removeprefix("offset.")] = Offset(*(t.float() for t in factors))
    return offsets


def _members(tensors: dict[str, Tensor], name: str) -> Members | None:
    found = {key.removeprefix("members."): t.float() for key, t in tensors.items() if key.startswith("members.")}
    if not found:
        return None
    shapes = {key: tuple(t.shape) for key, t in found.items()}
    w = shapes.get("mean", ())
    if shapes != {"mean": w, "factor": (*w, *w), "limit": ()} or len(w) != 1:
        raise ValueError(f"What '{name}' says of its pictures is damaged (shapes {brief(shapes)}). {AGAIN}")
    return Members(**found)


def load(path) -> Domain:
    """The domain in a file. Raises ValueError."""
    path = Path(path)
    if path.stat().st_size > LARGEST:
        raise ValueError(f"'{path.name}' has {path.stat().st_size / 2**20:.0f} MB; a domain has less than "
                         f"{LARGEST // 2**20}. This is another kind of file.")
    return parse(path.read_bytes(), path.name)


def save(domain: Domain, path) -> Path:
    """Write the domain to `path` (see `file.write`)."""
    return write(path, dump(domain))
