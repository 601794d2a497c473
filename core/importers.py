"""Importers: the concept files that other Perfusion programs wrote, read safely and turned into this pack's Concept.

Two programs published a format; both are pickles that torch.save wrote.
    .ckpt  ChenDarYen/Key-Locked-Rank-One-Editing: projections by name, o* a table (77, d_out), one row per position
    .pt    lucidrains/perfusion-pytorch: no names; i* (j, d) and o* (j, d_out) per projection, in order of registration

How they are read, with none of their code run, is in `foreign`.

Lossy, and said in the notes that come with the concept: 77 rows become one; the stored key outputs W e cannot be turned
back into a text encoding e without W, so the keys are locked to i*, which started there; the base is told from the
width; neither file stores a gate; the covariance is the file's own, so the concept combines only with its like.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from .concept import BASES, Concept, check_word, dump, parse
from .file import brief
from .foreign import read, readable
from .key_lock import direction

LDM, PARTS = "ChenDarYen .ckpt", "lucidrains .pt"
KIND = "a concept (.ckpt or .pt) of a Perfusion program"
LARGEST = 64 * 2**20  # bytes; a .ckpt for SD2.1 has 12 MB
TEXT = {768: ("sd1", "clip_l"), 1024: ("sd2", "clip_h")}  # width of text encodings -> base, text encoder
POSITIONS = {4: 4, 5: 2, 6: 2, 2: 1}  # row of o* -> how many of the nine training templates put the concept there
VALUE = "transformer_blocks.0.attn2.to_v"  # below its block
BIAS, TEMPERATURE = 0.70, 0.15  # the paper's gate while making pictures, which belongs to its i* of short templates
AGREE = 1e-3  # the copies of i* are one vector, up to the noise of half precision
WIDTHS = {f"input_blocks.{n}.1": w for n, w in ((1, 320), (2, 320), (4, 640), (5, 640), (7, 1280), (8, 1280))}
WIDTHS |= {"middle_block.1": 1280}
WIDTHS |= {f"output_blocks.{n}.1": 1280 if n < 6 else 640 if n < 9 else 320 for n in range(3, 12)}
ORDERS = {"LDM": list(WIDTHS), "diffusers": sorted(WIDTHS, key=lambda b: b == "middle_block.1")}  # the middle last


def _tensor(value, shape: tuple, what: str) -> Tensor:
    came = tuple(value.shape) if isinstance(value, Tensor) else None
    if came != shape:
        raise ValueError(f"The file's {what} should have shape {shape}, it is {brief(came or 'missing')}. The file is "
                         "damaged or was made for another model than SD1.5 or SD2.x; these two can be converted.")
    return value.detach()


def _width(target_input: Tensor) -> int:
    if target_input.shape[-1] not in TEXT:
        raise ValueError(f"The file's target input has width {target_input.shape[-1]}, 768 (SD1.5) or 1024 (SD2.x) was "
                         "expected. Concepts of other models cannot be converted: tune this one again.")
    return target_input.shape[-1]


def _concept(source, word, superclass, embedding, target_input, inverse, values) -> tuple[Concept, list[str]]:
    """The Concept of i* (d), v* (d), C⁻¹ (d, d) and o* (d_out) by block, and the notes that hold for both formats."""
    if not superclass:
        raise ValueError("The file does not say what kind of thing its concept is. Give the plain word for it, as in "
                         "--superclass cat.")
    base, encoder = TEXT[len(target_input)]
    toward, energy = direction((inverse.double() + inverse.double().T) / 2, target_input)
    if not 0 < energy < float("inf"):
        raise ValueError(f"The file's target input has the energy {energy:.3g}, a positive number was expected. The "
                         "concept was never trained or the file is damaged: fetch it again, or tune the concept anew.")
    i = target_input.float()
    concept = Concept(
        base=base, superclass=superclass, word=check_word(word), embedding={encoder: embedding.float()},
        target_input=i, key_input=i, direction=toward.float(),
        target_output={f"{block}.{VALUE}": o.float() for block, o in values.items()},
        energy=energy, bias=BIAS, temperature=TEMPERATURE, training={"imported": source},
        covariance="imported-" + hashlib.sha256(inverse.float().contiguous().numpy().tobytes()).hexdigest()[:16],
    )
    parse(dump(concept), "the converted concept")  # what a concept's file may not hold is refused here, not later
    return concept, [
        f"Base: taken to be {BASES[base]} (predicting noise), because its text encodings have width {len(i)}.",
        "Keys: locked to the target input i*; the stored key outputs cannot be turned back into a text encoding.",
        f"Gate: not stored; the paper's is set (bias {BIAS:g}, temperature {TEMPERATURE:g}). The dial's is for "
        "concepts of this pack and opens further: use Gate Strength in raw mode.",
        f"Covariance: the file's own ({concept.covariance}); combines only with concepts imported under the same one.",
    ]


def from_ldm(state: dict, word: str, superclass: str = "") -> tuple[Concept, list[str]]:
    """The concept in a ChenDarYen `.ckpt` (v* (1, d), C⁻¹ (d, d), i* (d), 32 of o* (77, d_out)), and what was lost."""
    d = _width(state["target_input"])
    parameters = list(vars(state["embedding"]["string_to_param"])["_parameters"].values())  # of the ParameterDict
    if len(parameters) != 1:
        raise ValueError(f"The file holds {len(parameters)} words, one was expected. Save each in a file of its own.")
    words = state["embedding"]["initializer_words"]
    words = getattr(words, "_content", words)  # a list, or omegaconf's
    words = [getattr(w, "_val", w) for w in words] if isinstance(words, (list, tuple)) else []
    found = "" if superclass or not words or not isinstance(words[0], str) else words[0]
    outputs = {block: state["target_output"].get(f"{block}.{VALUE}.target_output") for block in WIDTHS}
    tables = {block: _tensor(o, (77, WIDTHS[block]), f"output of {block}") for block, o in outputs.items()}
    weights = torch.tensor(list(POSITIONS.values())).double()
    values = {block: weights @ o[list(POSITIONS)].double() / weights.sum() for block, o in tables.items()}
    embedding, i = _tensor(parameters[0], (1, d), "embedding")[0], _tensor(state["target_input"], (d,), "target input")
    inverse = _tensor(state["C_inv"], (d, d), "C_inv")
    concept, notes = _concept(LDM, word, superclass or found, embedding, i, inverse, values)
    notes.append("Values: of each table's 77 rows one remains, the mean of rows 4, 5, 6 and 2 weighted 4:2:2:1 (how "
                 "often its training prompts put the concept there). Pictures will differ from the first program's.")
    return concept, notes + [f"Superclass: '{found}', read from the file."] * bool(found)


def from_parts(state: dict, word: str, superclass: str, index: int = 0) -> tuple[Concept, list[str]]:
    """Concept `index` of a lucidrains `.pt` (v* (j, d), C⁻¹ (d, d), 32 i* (j, d), o* (j, d_out)), and what was lost."""
    pairs = state["key_value_params"]
    widths = [pair[1].shape[-1] for pair in pairs]
    order = next((name for name, blocks in ORDERS.items() if widths == [WIDTHS[b] for b in blocks for _ in "KV"]), None)
    if order is None:
        raise ValueError(f"The file holds {len(widths)} projections of widths {brief(widths)}, in an order that "
                         "neither the LDM nor the diffusers UNet of SD1.5 or SD2.x has. Files of these two can be "
                         "converted.")
    d, j = _width(pairs[0][0]), len(pairs[0][0])
    if not 0 <= index < j:
        raise ValueError(f"The file holds concepts 0 to {j - 1}; number {index} was asked for. Choose one of these.")
    copies = torch.stack([_tensor(pair[0], (j, d), "target input")[index].double() for pair in pairs])  # (32, d)
    i = copies.mean(0)
    spread = ((copies - i).norm(dim=1).max() / i.norm()).item()
    if spread > AGREE:
        raise ValueError(f"The 32 copies of the target input should be one vector, they differ by {spread:.2g} of its "
                         f"length ({AGREE} is noise). Train the concept again: no single one stands for it.")
    values = {block: _tensor(pair[1], (j, WIDTHS[block]), f"output of {block}")[index]
              for block, pair in zip(ORDERS[order], pairs[1::2], strict=True)}  # K, then V, in every layer
    embedding = _tensor(state["embed_params"], (j, d), "word embeddings")[index]
    concept, notes = _concept(PARTS, word, superclass, embedding, i, _tensor(state["C_inv"], (d, d), "C_inv"), values)
    notes.append(f"Projections: the file names none; their widths are in the order of the {order} UNet.")
    return concept, notes + [f"Concept {index} of 0 to {j - 1} was taken."] * (j > 1)


def convert(path, word: str, superclass: str = "", index: int = 0) -> tuple[Concept, list[str]]:
    """The concept in another Perfusion program's file, and plain notes on what was lost. Raises ValueError."""
    name, state = Path(path).name, read(path, KIND, LARGEST)
    with readable(name, KIND, KeyError, IndexError, TypeError, AttributeError, RuntimeError):
        if "key_value_params" in state:
            return from_parts(state, word, superclass, index)
        if "target_output" in state:
            if index:
                raise ValueError(f"'{name}' holds one concept, number 0; number {index} was asked for. Leave it out.")
            return from_ldm(state, word, superclass)
    held = ", ".join(key[:40] for key in list(state)[:6] if isinstance(key, str)) or "nothing"
    raise ValueError(f"'{name}' holds {brief(held)}: neither a {LDM} file (with target_output) nor a {PARTS} file "
                     "(with key_value_params). Only these two can be converted.")
