"""Concepts onto a ComfyUI model: one APPLY_MODEL wrapper on a ModelPatcher clone, and the word inside its CLIP.

The wrapper swaps `forward` on the cross-attention projections for the length of one model call. Nothing persistent
touches the shared module, so whatever else the graph does to the model composes, and afterwards it is bit for bit what
it was. Applying twice makes one wrapper of both lists: the projection is joint, so their order does not matter.
"""

from contextlib import nullcontext
from functools import partial

import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP

from .acting import AS_ENCODED
from .apart import members, split
from .apart_comfy import begun, read_once
from .concept import BASES, Concept
from .joint_edit import JointEdit, check_fit
from .key_lock import edited, unit
from .prompt import PLACES, PRESENT, TEXTS, VERSIONS, WORDS, Token, embedding, superclass_ids, tokenizers, with_word
from .region import Blend, Words, blended
from .where import RUN

KEY = "perfusion"
FAMILIES = {"SD15": "sd1", "SD20": "sd2", "SDXL": "sdxl"}  # the host's classes; fine-tunes and inpainting derive
ENCODERS = {"creature": {"clip_l"}, "sd1": {"clip_l"}, "sd2": {"clip_h"}, "sdxl": {"clip_l", "clip_g"}}


def base_of(model) -> str:
    """The family that a MODEL belongs to, a key of BASES. Raises ValueError for any other architecture."""
    config = model.model.model_config
    if own := getattr(type(config), "perfusion_base", None):  # of the class: the host warns of what a config lacks
        return own
    for name, base in FAMILIES.items():
        if isinstance(config, getattr(comfy.supported_models, name)):
            return base
    raise ValueError(
        f"Perfusion edits cross-attention of SD1.5, SD2.x and SDXL; the connected model is {type(config).__name__}. "
        "Load a checkpoint of one of these families (fine-tunes and inpainting models too)."
    )


def check_clip(clip, base: str):
    """Raise ValueError where CLIP is not the text encoder of the model's family."""
    came = set(tokenizers(clip))
    if came != ENCODERS[base]:
        raise ValueError(
            f"The model is {BASES[base]} and its text encoder should be {' + '.join(sorted(ENCODERS[base]))}; the "
            f"connected CLIP is {' + '.join(sorted(came)) or type(clip.tokenizer).__name__}. Connect the CLIP that "
            "belongs to the model, usually the second output of the checkpoint loader."
        )


def projections(diffusion_model) -> dict[str, torch.nn.Module]:
    """Every cross-attention `to_k` and `to_v` of a UNet by its dotted name (SD1.5: 32, SDXL: 140)."""
    return {
        name.replace("_orig_mod.", ""): module  # torch.compile puts that before what it compiled
        for name, module in diffusion_model.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    }


def layers(diffusion_model) -> list[torch.nn.Module]:
    """The cross-attentions whose projections `projections` gives."""
    return [module for name, module in diffusion_model.named_modules() if name.endswith("attn2")]


def window(sampling, sigma: float):
    """Who acts at a noise level, by the parts of sampling that the host's own nodes mean."""
    return lambda acting: sampling.percent_to_sigma(acting.end) <= sigma <= sampling.percent_to_sigma(acting.start)


class ConceptWrapper:
    """Edits one model call for the rows whose prompt names a concept."""

    def __init__(self, concepts: tuple[Concept, ...], edit_negative: bool):
        self.concepts, self.edit_negative, self.edit = concepts, edit_negative, JointEdit(concepts)
        self.timed = any(c.acting.timed for c in concepts)

    def _acts(self, model, t):
        # a number from the device: one wait a call, which the host's own ranges of conditioning cost too
        return window(model.model_sampling, t[0].item()) if self.timed else lambda acting: True

    def __call__(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        words, said = kwargs.pop(WORDS, ()), kwargs.pop(PRESENT, None)
        versions, texts, places = kwargs.pop(VERSIONS, ()), kwargs.pop(TEXTS, None), kwargs.pop(PLACES, None)
        if said is None:  # encoded by a CLIP that knows none of the words
            words, said = (), torch.zeros(1, 0)
        none = said.new_zeros(len(said))
        columns = [said[:, words.index(c.word)] if c.word in words else none for c in self.concepts]
        present = torch.stack(columns, dim=1)
        if self.edit_negative:
            present = present.where(present != 0, 1.0)
        texts = dict(zip(versions, texts.chunk(len(versions), -1))) if versions else {}
        model, named = executor.class_obj, present  # on the CPU, where the host leaves the marks
        present = present.to(x.device)
        found, acts = projections(model.diffusion_model), self._acts(model, t)
        where, edit = self.edit.where(acts), partial(self.edit, present, words, texts)
        now = Words(word for word, acting in self.edit.acting.items() if word in words and acts(acting))
        together = [words.index(word) for word in members(self.edit.acting, now)]
        # where another node has lengthened the prompts nobody knows where in them a word stands
        known = places is not None and c_crossattn.shape == texts[AS_ENCODED].shape
        if known and not self.edit_negative and (said[:, together] != 0).sum(1).gt(1).any():
            def call():
                maps = control and {name: [*of] for name, of in control.items()}  # the model takes them out
                with edited(found, edit(now - members(self.edit.acting, now))):
                    executor(x, t, c_concat, c_crossattn, maps, transformer_options, **kwargs)

            r = read_once(x, places, transformer_options, model.diffusion_model, call)
            some = said.any(0).nonzero().flatten().tolist()  # a set for a word that no row says would cost attention
            where = where if r is None else split(where, self.edit.acting, [words[k] for k in some], r[:, some])
        edits = [edit(on) for on in where]
        run, blend = transformer_options.get(RUN), Blend(where.values(), x.shape[-2:])
        attention = layers(model.diffusion_model) if run or len(edits) > 1 else ()
        swap = edited(found, *edits) if len(edits) == 1 else blended(attention, found, edits, blend)
        with (swap as of, run.listening(x, transformer_options["uuids"], attention, self.concepts, named, of, blend)
              if run else nullcontext()):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def applied(model) -> tuple[Concept, ...]:
    """The concepts that a MODEL already carries, oldest first."""
    return tuple(c for w in model.get_wrappers(WrappersMP.APPLY_MODEL, KEY) for c in w.concepts)


def plain(model):
    """The MODEL without the concepts that it carries."""
    model = model.clone()
    for kind in WrappersMP.APPLY_MODEL, WrappersMP.OUTER_SAMPLE:
        model.remove_wrappers_with_key(kind, KEY)
    return model


def check(model, clip, concept: Concept):
    """Raise ValueError where the concept cannot work on this model and CLIP."""
    base = base_of(model)
    check_clip(clip, base)
    widths = {name: m.out_features for name, m in projections(model.model.diffusion_model).items() if "to_v" in name}
    check_fit(concept, base, widths, tokenizers(clip), applied(model))


def apply(model, clip, concept: Concept, edit_negative: bool = False, heard=None):
    """(MODEL, CLIP) clones on which the concept's word works; chain it for several concepts.

    Strength 0 gives the superclass word back in the prompt and leaves the model alone. `edit_negative` edits every
    row, also those whose prompt has no concept word, as the research code does, and keeps nothing apart. `heard` is
    told of every prompt that the CLIP encodes what the gate sees of it (see `Token`).
    Raises ValueError with a sentence where concept, model and CLIP do not fit together.
    """
    check(model, clip, concept)
    vector = {} if concept.off else concept.word_vector(embedding(clip, concept.superclass))
    token = Token(vector, superclass_ids(clip, concept.superclass),
                  unit(concept.direction, concept.target_input), heard, concept.acting)
    clip = with_word(clip, concept.word, token)
    if concept.off:
        return model, clip
    wrapper = ConceptWrapper((*applied(model), concept), edit_negative or any(
        w.edit_negative for w in model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)))
    model = plain(model)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    if members(wrapper.edit.acting, Words(wrapper.edit.acting)):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, begun)
    return model, clip
