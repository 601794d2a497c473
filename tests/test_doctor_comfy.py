"""Concept Doctor in ComfyUI on tiny checkpoints: what fits is said to fit, and what is broken is a line."""

import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from perfusion.core import doctor_comfy
from perfusion.core.covariance import captions, name_of
from perfusion.core.domain import Domain
from perfusion.core.encoder import Encoder
from perfusion.core.host_comfy import text_key
from perfusion.core.prompt import words_of
from perfusion.core.weight_offset import Offset, attention

import applied
from applied import KINDS, apply, projections
from concepts import learnt

pytestmark = pytest.mark.host

inference, world = applied.inference, applied.world  # fixtures


@pytest.fixture
def examine(tmp_path):
    def run(model=None, clip=None, concept=None, domain=None, found=None):
        return doctor_comfy.examine(model, clip, concept, domain, found or {}, tmp_path)

    return run


def wrong(report):
    return [line.removeprefix("- ✗ ") for line in report.splitlines() if line.startswith("- ✗ ")]


def domain_of(w, **changes):
    offsets = {name: Offset(torch.zeros(3, m.weight.shape[0]), torch.zeros(2, m.weight.shape[1]))
               for name, m in attention(w.model.model.diffusion_model).items()}
    return Domain(**{"base": "sd1", "prediction": "eps", "superclass": "cat", "tower": "0" * 64,
                     "encoder": Encoder(1, 8, {"clip_l": 64}, {"a.to_v": 4}), "offsets": offsets} | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_is_said_to_fit_and_is_left_as_it_was(world, examine, kind):
    w = world(kind)
    before = {name: t.clone() for name, t in w.model.model.state_dict().items()}
    concept = w.cat.replace(prediction="v" if kind.endswith("-v") else "eps")
    report = examine(w.model, w.clip, concept)
    assert wrong(report) == [] and "Nothing is wrong." in report
    assert "- `<mimi>` fits the model and the text encoder\n" in report
    assert f"{len(projections(w.model))} cross-attention projections" in report
    assert "- weights in float32, computed in float32" in report and report.count("weights in float") == 2
    for title in "Versions", "Model", "Text encoder", "Memory", "Together":
        assert f"## {title}\n" in report
    assert words_of(w.clip) == {} and all(torch.equal(before[n], t) for n, t in w.model.model.state_dict().items())


def test_the_word_is_in_pieces_before_apply_and_the_concept_after_it(world, examine):
    w = world()
    assert "`<mimi>` is read as `<</w>` `mi" in examine(w.model, w.clip, w.cat)
    model, clip = apply(w, w.cat)
    report = examine(model, clip, w.cat)
    assert wrong(report) == [] and "`<mimi>` is read as the concept" in report
    assert "carries `<mimi>`" in report and "taught `<mimi>`" in report
    assert "`<rex>` is read as `<</w>`" in examine(model, clip, w.dog)
    assert "`<mimi>` is read as its superclass" in examine(*apply(w, w.cat.at(0)), w.cat)


def test_a_superclass_in_pieces_is_shown_in_them(world, examine):
    w = world()
    report = examine(w.model, w.clip, w.cat.replace(superclass="axolotl"))
    assert "`axolotl` is read as `ax" in report
    assert len(wrong(report)) == 1 and "'axolotl' in 4 pieces" in wrong(report)[0]


def test_a_concept_of_another_family_or_prediction_is_one_line(world, examine):
    w = world("sd1")
    found = wrong(examine(w.model, w.clip, world("sdxl").cat))
    assert len(found) == 1 and "`<mimi>` was made for SDXL, the connected model is SD1.5" in found[0]
    w = world("sd2-v")
    found = wrong(examine(w.model, w.clip, w.cat))
    assert len(found) == 1 and "predicts eps, and this one predicts v" in found[0]


def test_a_clip_of_another_family_is_one_line(world, examine):
    found = wrong(examine(world("sd1").model, world("sd2").clip, world("sd1").cat))
    assert len(found) == 1 and "the connected CLIP is clip_h" in found[0]


def test_other_caption_statistics_are_told_from_the_same(world, examine, tmp_path):
    w = world()
    assert "are `cccccccccccc`, those of this text encoder `" in examine(w.model, w.clip, w.cat)
    own = w.cat.replace(covariance=name_of(text_key(w.clip), captions(tmp_path)))
    assert "statistics are those of this text encoder" in examine(w.model, w.clip, own)
    skipped = w.clip.clone()
    skipped.clip_layer(-2)
    assert "clip skip to layer -2" in (report := examine(w.model, skipped, own)) and "gate may open less" in report


def test_a_model_of_a_family_without_cross_attention_is_one_line(world, examine):
    w = world()
    other = w.model.clone()
    other.model = type("Flux", (), {})()
    other.model.__dict__ |= vars(w.model.model) | {"model_config": comfy.supported_models.Flux({})}
    other.model.get_dtype = w.model.model.get_dtype
    found = wrong(examine(other, w.clip, w.cat, domain_of(w)))
    assert isinstance(other, ModelPatcher) and len(found) == 1 and "the connected model is Flux" in found[0]


def test_weights_that_are_no_numbers_are_named(tiny, examine):
    model, clip, _ = tiny("sd1")
    place, module = next(iter(projections(model).items()))
    module.weight.data[0, 0] = torch.nan
    found = wrong(examine(model, clip))
    assert len(found) == 1 and "1 of 14 tensors hold values that are not numbers" in found[0] and place in found[0]


def test_a_model_that_is_more_than_the_memory_is_said(world, examine):
    w = world()
    vast = w.model.clone()
    vast.size = 2**60
    found = wrong(examine(vast, w.clip, w.cat))
    assert len(found) == 1 and "weights alone are more than there is" in found[0]


def test_a_domain_is_held_against_the_model(world, examine):
    w = world()
    report = examine(w.model, w.clip, None, domain_of(w))
    assert wrong(report) == [] and "the domain fits the model" in report
    assert "domain was trained on SDXL" in wrong(examine(w.model, w.clip, None, domain_of(w, base="sdxl")))[0]
    name, offset = next(iter(domain_of(w).offsets.items()))
    other = domain_of(w, offsets={name: Offset(offset.output[:, 1:], offset.input)})
    assert f"weight offset of {name}" in wrong(examine(w.model, w.clip, None, other))[0]
    broken = domain_of(w, offsets={name: Offset(offset.output + torch.nan, offset.input)})
    assert "not numbers" in wrong(examine(None, None, None, broken))[0]


def test_each_input_may_be_missing(world, examine):
    w = world()
    for model in (None, w.model):
        for clip in (None, w.clip):
            for concept in (None, w.cat):
                report = examine(model, clip, concept)
                assert wrong(report) == [] and ("not looked at" in report) == (None in (model, clip, concept))


def test_what_is_no_model_at_all_is_lines_and_no_error(examine):
    report = examine("a", "b", learnt())
    assert len(wrong(report)) >= 3 and "AttributeError" in report


def test_the_node_shows_the_report_and_says_where_files_are(pack, world):
    from perfusion.nodes import folders

    w, node = world(), pack["PerfusionConceptDoctor"]
    saved = folders.save(w.cat, "mimi")
    broken = folders.saved() / "broken.safetensors"
    broken.write_bytes(b"")
    (folders.saved() / "nowhere.safetensors").symlink_to("gone")
    answer = node.execute(w.model, w.clip, w.cat)
    report = answer.result[0]
    assert answer.ui == {"text": (report,)}
    assert f"{saved.parent}: 3 concepts" in report and "models/perfusion/domains: no such folder yet" in report
    assert ["broken.safetensors" in line or "a link leads nowhere" in line for line in wrong(report)] == [True, True]
    assert f"ComfyUI {__import__('comfyui_version').__version__}, frontend " in report
    assert node.fingerprint_inputs() != node.fingerprint_inputs(), "or a second look would show the first"
