"""Import a domain: a folder of the public E4T program (mkshing/e4t-diffusion) becomes this pack's Domain.

    config.json          what it was trained on; in a folder of a tuned model, under `pretrained_args`
    encoder.pt           the encoder, with its vision tower in it: see `public_encoder`
    weight_offsets.pt    the offsets of 96 weights, nine tensors each: see `weight_offset.fold`
    unet.pt              in the place of the last where it was tuned on a picture: the whole UNet, offsets in it

Encoder and offsets are folded, which is exact, and kept in fp16 like every domain's. Of the tower remain its last norm
and its hash, by which the one that is connected later is known for the same.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .domain import Domain
from .encoder import SCALE
from .foreign import read
from .openclip import as_transformers
from .public_encoder import fold as fold_encoder
from .tower import hash_of
from .unet_names import comfy_name
from .weight_offset import Offset
from .weight_offset import fold as fold_offset

SOURCE = "mkshing e4t-diffusion"
LARGEST, LARGEST_CONFIG = 6 * 2**30, 2**20  # bytes; unet.pt has 4.0 GB
WIDTH = 768  # of SD1.x's word embeddings; the program is for no other base
LAYERS = 2  # in a block of its UNet's way down
BLOCKS = [f"down_blocks.{k}.attentions.{j}" for k in range(3) for j in range(2)] + ["mid_block.attentions.0"]
BLOCKS += [f"up_blocks.{k}.attentions.{j}" for k in (1, 2, 3) for j in range(3)]
MODULES = {f"{block}.transformer_blocks.0.{attn}.wo_{part}" for block in BLOCKS for attn in ("attn1", "attn2")
           for part in "qkv"}
OFFSET = re.compile(r"(.+\.wo_[qkv])\.(.+)")
TOWER = "clip_vision."


def is_tuned(folder) -> bool:
    """Whether a folder is of a model that was tuned on a picture."""
    return (Path(folder) / "unet.pt").exists()


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors in a file of the folder, on the disk still."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"The folder '{folder.name}' lacks {name}. A folder of the public e4t-diffusion program has "
                         "config.json, encoder.pt, and weight_offsets.pt or, once tuned, unet.pt: fetch all of it.")
    state = read(path, f"{name} of the public e4t-diffusion program", LARGEST)
    for key, t in state.items():
        # one that claims more than is stored would fill the memory once it is used
        plain = isinstance(t, Tensor) and t.numel() * t.element_size() <= t.untyped_storage().nbytes()
        if not isinstance(key, str) or not plain or not t.is_floating_point() or not t.isfinite().all():
            raise ValueError(f"'{name}' should hold tensors of numbers by name, and {str(key)[:80]} is none, or has "
                             "NaN or infinite values in it. Fetch the file again, or choose another folder.")
    return state


def _config(folder: Path) -> dict:
    """What config.json says of the domain: those of `pretrained_args` before the tuning's own."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"The folder '{folder.name}' has no config.json, which says what its domain is of. Fetch it "
                         "from where the other files are from.")
    try:
        with path.open(encoding="utf-8") as file:
            found = json.loads(file.read(LARGEST_CONFIG))
        found = found | found.get("pretrained_args", {})
        kept = {"superclass": found["domain_class_token"].strip(), "scale": found["domain_embed_scale"],
                "model": Path(found["pretrained_model_name_or_path"]).name, "resolution": found.get("resolution", 512)}
        if not kept["superclass"] or type(kept["resolution"]) is not int or not 64 <= kept["resolution"] <= 2048:
            raise ValueError("a value is out of range")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config.json in '{folder.name}' should say domain_class_token, domain_embed_scale, "
                         f"pretrained_model_name_or_path and a resolution from 64 to 2048 ({type(error).__name__}: "
                         f"{error}). Fetch it again.") from error
    if kept["scale"] != SCALE:
        raise ValueError(f"The encoder in '{folder.name}' was trained at domain_embed_scale {kept['scale']}, and this "
                         f"pack's are at {SCALE}, the paper's. Train it again at that, or use another.")
    return kept


def _offsets(state: Mapping[str, Tensor], file: str) -> dict[str, Offset]:
    """The offsets by the name that ComfyUI has for their weights."""
    modules = {}
    for name, t in state.items():
        known = OFFSET.fullmatch(name)
        module, part = known.groups() if known else (name, "")
        modules.setdefault(module, {})[part] = t
    if modules.keys() != MODULES:
        raise ValueError(f"'{file}' should hold the offsets of {len(MODULES)} weights of SD1.x; it lacks "
                         f"{sorted(MODULES - modules.keys())[:3] or 'nothing'} and holds unknown "
                         f"{sorted(modules.keys() - MODULES)[:3] or 'nothing'}. Fetch it again, complete.")
    found = {}
    for module, tensors in modules.items():
        try:
            offset = fold_offset(tensors)
        except ValueError as error:
            raise ValueError(f"{module} in '{file}': {error}") from error
        found[comfy_name(module.replace(".wo_", ".to_"), LAYERS)] = Offset(*(t.float() for t in offset))
    return found


def _domain(folder: Path, offsets: Mapping[str, Tensor], file: str) -> tuple[Domain, list[str]]:
    facts, state = _config(folder), _tensors(folder, "encoder.pt")
    encoder = fold_encoder(state)
    if encoder.out["clip_l"].out_features != WIDTH:
        raise ValueError(f"The encoder in '{folder.name}' answers with {encoder.out['clip_l'].out_features} numbers, "
                         f"where the words of SD1.x have {WIDTH}. Only domains of SD1.x can be imported.")
    tower = as_transformers({name.removeprefix(TOWER): t for name, t in state.items() if name.startswith(TOWER)})
    domain = Domain("sd1", "eps", facts["superclass"], hash_of(tower), encoder, _offsets(offsets, file),
                    {"imported": SOURCE, "model": facts["model"], "resolution": facts["resolution"]})
    return domain, [
        f"Superclass: '{domain.superclass}'. Base: {facts['model']}; on other checkpoints of SD1.x it has not been "
        "measured.",
        f"Tower: the CLIP vision model whose hash begins with {domain.tower[:12]}, usually CLIP-ViT-H-14; it is not "
        "in the file, and another is refused.",
        "Encoder: the public program's own. It reads every second token of the tower's last layer, where the paper "
        "reads every second layer, and looks at the UNet with the offsets on.",
        "Folded exactly, then rounded to fp16. Pictures are cropped to their middle square, where the program squashes "
        "them.",
    ]


@torch.no_grad()
def pretrained(folder) -> tuple[Domain, list[str]]:
    """The domain in a folder that `pretrain_e4t.py` saved, and plain notes on it. Raises ValueError."""
    folder = Path(folder)
    return _domain(folder, _tensors(folder, "weight_offsets.pt"), "weight_offsets.pt")


@torch.no_grad()
def tuned(folder) -> tuple[Domain, dict[str, Tensor], list[str]]:
    """What a folder that `tuning_e4t.py` saved has as a domain, the UNet's other tensors under diffusers' names, on the
    disk still, and plain notes. Raises ValueError."""
    folder = Path(folder)
    if (folder / "text_encoder.pt").exists():
        raise ValueError(f"The model in '{folder.name}' was tuned with its text encoder, and a concept works with the "
                         "plain one. Tune it again without --train_text_encoder.")
    state = _tensors(folder, "unet.pt")
    offsets = {name: t for name, t in state.items() if OFFSET.fullmatch(name)}
    rest = {name: t for name, t in state.items() if name not in offsets}
    domain, notes = _domain(folder, offsets, "unet.pt")
    return domain, rest, notes
