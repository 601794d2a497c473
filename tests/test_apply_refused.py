"""Concepts that do not fit the connected model: each gets a sentence, and nothing is left of the attempt."""

import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from perfusion.core import apply as applying
from perfusion.core.prompt import words_of

import applied
from applied import apply, swapped

pytestmark = pytest.mark.host

inference, world = applied.inference, applied.world  # fixtures


def refused(w, concept, said, model=None, clip=None):
    """The concept is refused in these words, and nothing is left of the attempt."""
    model, clip = model or w.model, clip or w.clip
    wrappers, words = model.get_all_wrappers(WrappersMP.APPLY_MODEL), list(words_of(clip))
    with pytest.raises(ValueError, match=said):
        applying.apply(model, clip, concept)
    assert model.get_all_wrappers(WrappersMP.APPLY_MODEL) == wrappers
    assert list(words_of(clip)) == words and swapped(model) == []


def test_a_concept_of_another_base_gets_a_sentence(world):
    refused(world("sd1"), world("sdxl").cat, "<mimi> was made for SDXL, the connected model is SD1.5. Load a check")
    refused(world("sdxl"), world("sd1").cat, "made for SD1.5, the connected model is SDXL")
    refused(world("sd2"), world("sd1").cat, "made for SD1.5, the connected model is SD2.x")


def test_the_clip_of_another_family_gets_a_sentence(world):
    w = world("sd1")
    refused(w, w.cat, "model is SD1.5 .* should be clip_l; the connected CLIP is clip_h", clip=world("sd2").clip)
    refused(w, w.cat, "connected CLIP is clip_g . clip_l", clip=world("sdxl").clip)
    refused(world("sdxl"), world("sdxl").cat, "should be clip_g . clip_l; the connected CLIP is clip_l", clip=w.clip)


def test_a_concept_of_a_unet_with_other_layers_gets_a_sentence(world):
    w = world()
    name, o = next(iter(w.cat.target_output.items()))
    rest = {n: v for n, v in w.cat.target_output.items() if n != name}
    refused(w, w.cat.replace(target_output=rest), "holds 6 value outputs .* has 7 value projections.*tune it again")
    refused(w, w.cat.replace(target_output={**rest, name: o[:-1]}), "7 value projections of other names or widths")
    refused(w, w.cat.replace(target_output={**rest, "input_blocks.9.1.to_v": o}), "of other names or widths")
    refused(w, w.cat.replace(embedding={}), "embeddings for no encoder")


def test_concepts_of_different_covariances_get_a_sentence(world):
    w = world()
    model, clip = apply(w, w.cat)
    refused(w, w.dog.replace(covariance="d" * 32), "<mimi> and <rex> .*cccccccccccc and dddddddddddd", model, clip)


def test_the_same_concept_twice_gets_a_sentence(world):
    w = world()
    model, clip = apply(w, w.cat)
    refused(w, w.cat, "Two of the applied concepts are called <mimi>", model, clip)
    refused(w, w.cat.replace(word="<other>"), "the same to the text encoder", model, clip)


def test_a_superclass_of_several_words_gets_a_sentence(world):
    refused(world(), world().cat.replace(superclass="black cat"), "one plain word")


def test_an_unsupported_architecture_gets_a_sentence(world):
    w = world("sdxl")
    config = comfy.supported_models.SDXLRefiner(dict(w.model.model.model_config.unet_config))
    config.unet_config.pop("num_heads", None)
    model = config.get_model({}, "", device="cpu")
    cpu = torch.device("cpu")
    refused(w, w.cat, "SD1.5, SD2.x and SDXL; the connected model is SDXLRefiner", ModelPatcher(model, cpu, cpu))
