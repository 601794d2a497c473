"""Concept: the one thing learned, and its .safetensors file.

The file holds what applying needs and nothing more: fp16 tensors by name (`embedding.<encoder>`, `target_input`,
`key_input`, `direction`, `target_output.<projection>`, values only) and string metadata. SD1.5: about 35 KB.
Its second format has the value outputs in int8 (int8.py): a reader of the first alone would take them for what they are
not, and refuses it by its name. A file is only ever parsed as safetensors. When and where a concept acts is not in it:
that belongs to one picture, while strength, which is in it, says how well the concept was learnt.
"""

import base64
import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from . import fidelity as curves
from .acting import Acting
from .file import brief, pack, unpacked, write
from .int8 import kind, narrowed, widened
from .key_lock import BIAS, TEMPERATURE

FORMAT = "perfusion-concept/1"
FORMATS = {FORMAT: "fp16", "perfusion-concept/2": "int8"}  # how precise the value outputs are
BASES = {"sd1": "SD1.5", "sd2": "SD2.x", "sdxl": "SDXL", "creature": "the creature demo"}
LARGEST = 16 * 2**20  # bytes; SDXL with a cover is far below
LARGEST_EMBEDDED = 2**20  # characters; SDXL has 251,000, and every picture holds them twice
WORD = re.compile(r"<[\w-]+>")
TENSOR = re.compile(r"embedding\.(clip_[lgh])|target_input|key_input|direction|target_output\..+")


@dataclass(frozen=True)
class Concept:
    """What was learned, in fp32 on the CPU. `strength` is the artist's dial, unless a raw gate `bias` is set."""

    base: str  # a key of BASES; a fine-tune or an inpainting UNet takes its family's
    superclass: str
    word: str  # `<mimi>`
    embedding: dict[str, Tensor]  # text encoder -> (d of that encoder) v*
    target_input: Tensor  # (d) i*
    key_input: Tensor  # (d)
    direction: Tensor  # (d) C⁻¹ i* / energy
    target_output: dict[str, Tensor]  # value projection -> (d_out) o*
    energy: float
    covariance: str  # hash of the covariance that the direction was taken under
    prediction: str = "eps"
    strength: float = 0.75
    bias: float | None = None
    temperature: float = TEMPERATURE
    domain: str = ""
    training: dict = field(default_factory=dict)
    cover: str = ""  # base64 of a JPEG
    fidelity: curves.Curve | None = None  # what its dial gives and takes, where that was measured
    precision: str = "fp16"  # of the value outputs in its file, or int8
    acting: Acting = Acting()  # of the graph, not of the file

    @property
    def off(self) -> bool:
        """Strength 0, or nothing encoded: the superclass word stands for it, and the model is not touched."""
        return self.blank or self.bias is None and self.strength == 0

    @property
    def blank(self) -> bool:
        """Nothing was encoded: its pictures are of nothing that the domain knows (see encode.py)."""
        facts = self.training
        return facts.get("far", 0) != 0 == facts.get("steps") and facts["far"] == facts.get("pictures")

    @property
    def gate_bias(self) -> float:
        return BIAS if self.bias is None else self.bias

    @property
    def scale(self) -> float:
        """How much of the concept there is: of its edit, and of its word's way from the superclass word's embedding.

        The gate's bias alone would be a dial with a jump at its start: bench/research.md has the four that were tried.
        """
        return self.strength if self.bias is None else 1.0

    def word_vector(self, superclass: dict[str, Tensor]) -> dict[str, Tensor]:
        """The word's embedding (d) of each text encoder at this scale, from the superclass word's."""
        return {name: superclass[name].to(v).lerp(v, self.scale) for name, v in self.embedding.items()}

    def at(self, strength: float) -> "Concept":
        """The same concept with its dial at `strength` in 0..1."""
        return self.replace(strength=strength, bias=None, temperature=TEMPERATURE)

    def raw(self, bias: float, temperature: float) -> "Concept":
        """The same concept with the paper's gate, β and τ."""
        return self.replace(bias=bias, temperature=temperature)

    def kept_apart(self, apart: bool) -> "Concept":
        """The same concept, kept apart from others in one picture or not (apart.py)."""
        return self.replace(acting=replace(self.acting, apart=apart))

    def replace(self, **changes) -> "Concept":
        return replace(self, **changes)


def check_word(word: str) -> str:
    """The word itself, if a prompt can hold it and no prompt means anything else by it. Raises ValueError."""
    if not WORD.fullmatch(word):
        plain = re.sub(r"[^\w-]", "", word) or "mimi"
        raise ValueError(
            f"The concept's word is written in angle brackets, so that it cannot be one that the text encoder already "
            f"knows: got '{brief(word)}', try '<{brief(plain)}>' (letters, digits, - and _)."
        )
    return word


def dump(concept: Concept) -> bytes:
    """The file's bytes; the same concept gives the same bytes. Raises ValueError where a value is no fp16 number."""
    tensors = {f"embedding.{name}": v for name, v in concept.embedding.items()}
    tensors |= {name: getattr(concept, name) for name in ("target_input", "key_input", "direction")}
    tensors |= {f"target_output.{name}": o for name, o in concept.target_output.items()}
    metadata = {
        "format": next(name for name, precision in FORMATS.items() if precision == concept.precision),
        "gate": json.dumps({"bias": concept.bias, "temperature": concept.temperature}),
        "training": json.dumps(concept.training, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{concept.base}/perfusion-concept",
        "modelspec.implementation": "https://arxiv.org/abs/2305.01644",
        "modelspec.title": f"{concept.word} ({concept.superclass})",
        "modelspec.trigger_phrase": concept.word,
        "modelspec.description": f"One {concept.superclass}, for {BASES[concept.base]}",
        "modelspec.usage_hint": f"Strength {concept.strength:g}",
    }
    metadata |= {name: str(getattr(concept, name)) for name in
                 ("base", "prediction", "superclass", "word", "strength", "energy", "covariance", "domain")}
    if concept.fidelity:
        metadata["fidelity"] = curves.dumped(concept.fidelity)
    if concept.cover:
        metadata["ssmd_cover_images"] = json.dumps([concept.cover])
    tensors = {name: t.half().contiguous() for name, t in tensors.items()}
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(
                f"'{name}' of {concept.word} holds values that its file cannot (NaN, infinite or beyond 65504): "
                "learning diverged. Nothing was saved; tune the concept again with fewer steps or another seed."
            )
    return pack(tensors if concept.precision == "fp16" else narrowed(tensors), metadata)


def parse(data: bytes, name: str) -> Concept:
    """The concept that a file's bytes hold; `name` is for messages. Raises ValueError with a sentence."""
    again = "Load another file, or tune the concept again."
    tensors, metadata = unpacked(data, name, again)
    if metadata.get("format") not in FORMATS:
        raise ValueError(
            f"'{name}' is not a concept of this pack: its format should be {' or '.join(FORMATS)}, it is "
            f"{brief(metadata.get('format', 'not given'))}. Files of other Perfusion programs go through "
            "`python -m headless convert` first."
        )
    try:
        gate, cover = json.loads(metadata["gate"]), json.loads(metadata.get("ssmd_cover_images", "[]"))
        facts = {key: metadata[key] for key in ("superclass", "prediction", "covariance", "domain")}
        facts |= {key: float(metadata[key]) for key in ("strength", "energy")}
        facts |= {"base": metadata["base"], "word": check_word(metadata["word"]), "cover": "".join(cover[:1])}
        facts |= {"training": json.loads(metadata["training"]), "temperature": float(gate["temperature"])}
        facts["precision"] = FORMATS[metadata["format"]]
        facts["fidelity"] = curves.parsed(metadata["fidelity"]) if "fidelity" in metadata else None
        facts["bias"] = None if gate["bias"] is None else float(gate["bias"])
        numbers = facts["strength"], facts["energy"], facts["temperature"], facts["bias"] or 0.0
        in_range = 0 <= facts["strength"] <= 1 and facts["energy"] > 0 and facts["temperature"] > 0
        known = facts["base"] in BASES and facts["prediction"] in ("eps", "v") and facts["superclass"]
        if not isinstance(facts["training"], dict):
            raise ValueError(f"training is a {type(facts['training']).__name__}, facts by name were expected")
        if not known or not in_range or not all(map(math.isfinite, numbers)):
            raise ValueError("a value is out of range")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"The facts stored in '{name}' are damaged ({brief(error)}). {again}") from error
    return _assemble(tensors, facts, name, again)


def _assemble(tensors: dict[str, Tensor], facts: dict, name: str, again: str) -> Concept:
    if facts["precision"] == "int8":
        tensors = widened(tensors, name, again)
    unknown = [key for key in tensors if not TENSOR.fullmatch(key)]
    kinds = {key.partition(".")[0] for key in tensors}
    missing = {"embedding", "target_input", "key_input", "direction", "target_output"} - kinds
    if unknown or missing:
        raise ValueError(f"'{name}' lacks {sorted(missing) or 'nothing'} and holds unknown "
                         f"{brief(unknown or 'nothing')}. {again}")
    for key, t in tensors.items():
        if not t.is_floating_point():
            raise ValueError(f"'{brief(key)}' in '{name}' is {kind(t)}, fp16 was expected. {again}")
    tensors = {key: t.float() for key, t in tensors.items()}
    for key, t in tensors.items():
        if t.ndim != 1:
            raise ValueError(f"'{brief(key)}' in '{name}' has shape {brief(tuple(t.shape))}, a vector was expected. "
                             f"{again}")
        if not t.isfinite().all():
            raise ValueError(f"'{brief(key)}' in '{name}' holds values that are not numbers (NaN or infinite). {again}")
    widths = [len(tensors[key]) for key in ("target_input", "key_input", "direction")]
    if len(set(widths)) > 1:
        raise ValueError(
            f"Target input, key input and direction in '{name}' should have one width, they have {widths}. {again}"
        )
    if not 0.5 < tensors["direction"] @ tensors["target_input"] < 2:  # 1 but for fp16
        raise ValueError(f"The direction in '{name}' does not belong to its target input. {again}")
    empty = [key for key, t in tensors.items() if not len(t)]
    if empty:
        raise ValueError(f"'{brief(empty[0])}' in '{name}' holds no number at all. {again}")
    return Concept(
        embedding={key.removeprefix("embedding."): t for key, t in tensors.items() if key.startswith("embedding.")},
        target_input=tensors["target_input"],
        key_input=tensors["key_input"],
        direction=tensors["direction"],
        target_output={
            key.removeprefix("target_output."): t for key, t in tensors.items() if key.startswith("target_output.")
        },
        **facts,
    )


def check_size(size: int, name: str):
    """Raise ValueError where a file of `size` bytes is too large for a concept."""
    if size > LARGEST:
        raise ValueError(f"'{name}' has {size / 2**20:.0f} MB; a concept has less than one. "
                         "This is another kind of file.")


def load(path, sha256: str = "") -> Concept:
    """The concept in a file. Where `sha256` is given the file must be that very one. Raises ValueError."""
    return _verified(read(path), Path(path).name, sha256)


def read(path) -> bytes:
    """The bytes of a concept's file. Raises ValueError where there are none to read, or far too many."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)  # it may have grown
    except OSError as error:
        raise ValueError(f"'{path.name}' could not be read ({error.strerror}). It may have been moved meanwhile: "
                         "choose another, or put it back.") from error
    check_size(max(size, len(data)), path.name)
    return data


def embed(concept: Concept) -> tuple[str, str]:
    """What a workflow carries: base64 of the concept's file without the cover, and the SHA-256 of that file.

    Raises ValueError where it is too large to travel.
    """
    data = dump(concept.replace(cover=""))
    text = base64.b64encode(data).decode()
    if len(text) > LARGEST_EMBEDDED:
        raise ValueError(f"{concept.word} would add {len(text) / 2**20:.1f} MB to the workflow; it may add one. "
                         "Share its file beside the workflow.")
    return text, hashlib.sha256(data).hexdigest()


def unpack(text: str, sha256: str = "") -> Concept:
    """The concept that a workflow carries as base64. Raises ValueError."""
    if len(text) > LARGEST_EMBEDDED:
        raise ValueError(f"The concept in the workflow has {len(text) / 2**20:.1f} MB; it should have less than one. "
                         "Ask for the file and load it by name.")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"The concept in the workflow is damaged ({error}). Ask for the file and load it by "
                         "name.") from error
    return _verified(data, "the concept in the workflow", sha256)


def _verified(data: bytes, name: str, sha256: str) -> Concept:
    came = hashlib.sha256(data).hexdigest()
    if sha256 and came != sha256:
        raise ValueError(
            f"The workflow was made with another '{name}' (its hash {sha256[:12]}, this one's {came[:12]}). "
            "Get the file that it was made with, or press 'Use this file' on the node to go on with this one."
        )
    return parse(data, name)


def save(concept: Concept, path) -> Path:
    """Write the concept to `path` (see `write`)."""
    return write(path, dump(concept))
