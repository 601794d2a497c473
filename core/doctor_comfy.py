"""Concept Doctor in ComfyUI: what is connected, whether it fits together, and the memory that it needs.

Nothing is loaded onto a device and nothing is changed: weights are read where they lie.
"""

from collections.abc import Iterable, Mapping

import comfy.model_management as memory
import comfyui_version
import torch
from comfy.model_sampling import V_PREDICTION

from . import apply as applying
from . import encode as encoding
from . import weight_offset
from .concept import BASES, Concept
from .covariance import captions, name_of
from .doctor import WRONG, examined, installed, numbers, of_concept, of_domain, of_folders, report, versions
from .domain import Domain
from .host_comfy import ComfyHost, any_tune, text_key
from .memory import MARGIN, size
from .prompt import WordTokenizer, superclass_ids, tokenizers, words_of

SIDES = {"sd1": 512, "sd2": 768, "sdxl": 1024, "creature": 128}  # pixels that a base is at home with


def examine(model, clip, concept: Concept | None, domain: Domain | None, found: Mapping[str, Mapping], folder) -> str:
    """The report on what is connected, each of it or None. `found` has the files of each kind by the folder that they
    are in; `folder` keeps the covariances, and a user's own captions."""
    folders = [line for kind, files in found.items() for line in examined(of_folders, kind, files)]
    sections = {"Versions": examined(versions) + examined(of_host), "Folders": folders}
    if concept:
        sections["Concept"] = examined(of_concept, concept)
    if domain:
        sections["Domain"] = examined(of_domain, domain)
    if model:
        sections["Model"] = examined(of_model, model)
    if clip:
        sections["Text encoder"] = examined(of_clip, clip)
        for learnt in filter(None, (concept, domain)):
            sections["Text encoder"] += examined(of_superclass, clip, learnt.superclass)
        if concept:
            sections["Text encoder"] += examined(of_word, clip, concept.word)
    if model and clip:
        sections["Memory"] = examined(of_memory, model, clip, folder)
    sections["Together"] = []
    if model and clip and concept:
        sections["Together"] += examined(of_fit, model, clip, concept, folder)
    if model and domain:
        sections["Together"] += examined(of_domain_fit, model, domain)
    missing = [name for name, thing in {"model": model, "clip": clip, "concept": concept}.items() if not thing]
    if missing:
        sections["Together"].append(f"not connected, so not looked at: {', '.join(missing)}")
    return report(sections)


def of_host() -> Iterable[str]:
    """The host, its frontend, and where it computes."""
    yield f"ComfyUI {comfyui_version.__version__}, frontend {installed('comfyui-frontend-package')}"
    yield f"computes on {memory.get_torch_device_name(memory.get_torch_device())}"


def prediction_of(model) -> str:
    return "v" if isinstance(model.get_model_object("model_sampling"), V_PREDICTION) else "eps"


def name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def of_model(model) -> Iterable[str]:
    """A MODEL's weights and whether those that a concept edits are numbers, its family, and the concepts that it
    carries. Raises ValueError for a family that has no place for any."""
    computed = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    yield f"weights in {name(model.model.get_dtype())}, computed in {name(computed)}, {len(model.patches)} patched"
    base = applying.base_of(model)
    yield f"{BASES[base]} ({prediction_of(model)})"
    projections = applying.projections(model.model.diffusion_model)
    yield f"{len(projections)} cross-attention projections, which are what a concept edits"
    yield from numbers({place: module.weight for place, module in projections.items()})
    carried = [f"`{concept.word}`" for concept in applying.applied(model)]
    yield f"carries {', '.join(carried) or 'no concept'}"


def of_clip(clip) -> Iterable[str]:
    """The text encoders of a CLIP and the words that it was taught."""
    skip = "no clip skip" if clip.layer_idx is None else f"clip skip to layer {clip.layer_idx}"
    kinds = sorted({name(weight.dtype) for weight in clip.cond_stage_model.parameters()})
    yield f"{' + '.join(sorted(tokenizers(clip))) or 'no CLIP'}, weights in {' and '.join(kinds)}, {skip}"
    yield f"taught {', '.join(f'`{word}`' for word in words_of(clip)) or 'no word'}"


def pieces(clip, word: str) -> str:
    """The pieces in which each text encoder takes a word that it was not taught."""
    found = {}
    for encoder, tokenizer in tokenizers(clip).items():
        plain = tokenizer.tokenizer
        plain = plain.base if isinstance(plain, WordTokenizer) else plain
        ids = plain(word)["input_ids"][tokenizer.tokens_start : -1]
        found[" ".join(f"`{tokenizer.inv_vocab[i]}`" for i in ids)] = encoder  # SDXL's two have one vocabulary
    return " or ".join(found)


def of_superclass(clip, superclass: str) -> Iterable[str]:
    """How a CLIP reads the superclass. Raises ValueError where it is not one word that it knows."""
    yield f"`{superclass}` is read as {pieces(clip, superclass)}"
    superclass_ids(clip, superclass)


def of_word(clip, word: str) -> Iterable[str]:
    """How a CLIP reads the concept's word."""
    if token := words_of(clip).get(word):
        yield f"`{word}` is read as {'the concept' if token.vector else 'its superclass: it was applied at strength 0'}"
    else:
        yield (f"`{word}` is read as {pieces(clip, word)}: this CLIP was not taught it. Prompts with the word are for "
               "the CLIP that comes out of Apply Perfusion Concept")


def of_memory(model, clip, folder) -> Iterable[str]:
    """What drawing and tuning need, and what there is. Raises ValueError where tuning cannot fit."""
    device, base = model.load_device, applying.base_of(model)
    side = SIDES[base]
    latents = torch.zeros(1, model.model.latent_format.latent_channels, side // 8, side // 8)
    drawing = model.model.memory_required([2, *latents.shape[1:]])
    weights = model.model_size() + clip.patcher.model_size()
    free, total = memory.get_free_memory(device), memory.get_total_memory(device)
    yield f"{size(free)} free of {size(total)} on {device}; what else is loaded makes room when it has to"
    yield (f"{size(weights)} for the weights of model and text encoder; beside them, at {side}×{side} pixels, "
           f"{size(drawing)} to draw")
    if weights > total:
        raise ValueError("The weights alone are more than there is, and Quick Tune needs all of them at once. Tune on "
                         "a smaller model, or load this one in half precision.")
    host = ComfyHost(model, clip, None, "creature" if base == "creature" else "cat", folder)
    host.learn_on(model, clip.patcher)
    need = host.needed(any_tune(host, latents), tight=False)
    yield f"Quick Tune needs about {size(weights + need)} with the weights"
    if weights + need * MARGIN > total:
        less = host.needed(any_tune(host, latents), tight=True)
        yield ("that is more than there is, so it keeps less and computes it again, which takes longer: about "
               f"{size(weights + less)}")
        if weights + less > total:
            yield "even that is more than there is. A lower resolution needs less"


def of_fit(model, clip, concept: Concept, folder) -> Iterable[str]:
    """Whether a concept works on this MODEL and CLIP. Raises ValueError where it cannot."""
    applying.check(model, clip, concept)
    yield f"`{concept.word}` fits the model and the text encoder"
    if concept.prediction != prediction_of(model):
        yield (f"{WRONG}`{concept.word}` was learnt on a model that predicts {concept.prediction}, and this one "
               f"predicts {prediction_of(model)}. Load a checkpoint of the other kind, or tune it again on this one.")
    # the demo has its world's captions beside it
    folder = model.model.model_config.folder if concept.base == "creature" else folder
    own = name_of(text_key(clip), captions(folder))
    if own == concept.covariance:
        yield "its caption statistics are those of this text encoder"
    else:
        yield (f"its caption statistics are `{concept.covariance[:12]}`, those of this text encoder `{own[:12]}`: "
               "another text encoder, clip skip or caption file. It works, and its gate may open less")


def of_domain_fit(model, domain: Domain) -> Iterable[str]:
    """Whether a domain fits this MODEL; its vision tower is not asked. Raises ValueError where it does not."""
    encoding.check(domain, applying.base_of(model), prediction_of(model), domain.tower, domain.superclass)
    weight_offset.check_fit(weight_offset.attention(model.model.diffusion_model), domain.offsets)
    yield "the domain fits the model"
