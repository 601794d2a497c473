"""Fidelity Curve in ComfyUI: what it draws is what Gate Strength and Apply give, and it leaves nothing behind."""

import json

import comfy.model_management as memory
import pytest
import torch
from comfy.clip_vision import ClipVisionModel

from perfusion.core import demo_comfy, fidelity_comfy
from perfusion.core import domain as domains
from perfusion.core.concept import dump, load, parse
from perfusion.core.domain_comfy import encode_concept
from perfusion.core.fidelity import PROMPTS, likeness, obedience
from perfusion.core.host_comfy import picture
from perfusion.core.tower import prepare
from perfusion.headless.learn import DEMO

import applied
from applied import apply, swapped
from served import serving

pytestmark = pytest.mark.host

inference, world = applied.inference, applied.world  # fixtures
TWO = "\n".join(PROMPTS[:2])


@pytest.fixture(scope="module")
def demo():
    """The demo's four, its picture of Mimi, and what Encode Concept makes of that."""
    with torch.inference_mode():
        model, clip, vae, vision = demo_comfy.load(DEMO)
        photo = demo_comfy.load_picture(DEMO, "mimi")
        concept = encode_concept(domains.load(DEMO / "domains" / "creature.safetensors"), model, clip, vae, vision,
                                 photo, "creature", "<mimi>", None, DEMO, lambda done, total: None)
        return model, clip, vae, vision, concept, photo


def measure(demo, strengths="0, .5, 1", prompts=TWO, drew=lambda *_: None, **changes):
    model, clip, vae, vision, concept, photo = demo
    given = {"model": model, "clip": clip, "vae": vae, "clip_vision": vision, "concept": concept, "images": photo}
    return fidelity_comfy.measure(**given | changes, strengths=strengths, prompts=prompts, seed=7, resolution=128,
                                  drew=drew)


def weights(*patchers):
    return [{name: t.clone() for name, t in p.model.state_dict().items()} for p in patchers]


def test_a_curve_is_drawn_in_one_way_and_leaves_the_models_bit_for_bit(demo):
    model, clip, vae, vision, concept, photo = demo
    patchers = model, clip.patcher, vae.patcher, vision.patcher
    before, heard = weights(*patchers), []
    measured, pictures = measure(demo, drew=lambda made, done, total: heard.append((done, total)))
    assert [all(torch.equal(t, now[name]) for name, t in was.items())
            for was, now in zip(before, weights(*patchers))] == [True] * 4 and not swapped(model)
    assert heard == [(k, 6) for k in range(1, 7)] and pictures.shape == (3, 2, 128, 128, 3)
    for row, strength in ((0, 0), (1, 0.5), (2, 1)):
        here, words = applied.applying.apply(model, clip, concept.at(strength))
        for place, prompt in enumerate(PROMPTS[:2]):
            made = picture(here, words, vae, prompt.replace("{}", "<mimi>"), (16, 16), 7 + place)
            assert torch.equal(pictures[row, place], made[0].clamp(0, 1))
    plain = picture(model, clip, vae, PROMPTS[0].replace("{}", "creature"), (16, 16), 7)
    assert torch.equal(pictures[0, 0], plain[0].clamp(0, 1))
    curve = measured.fidelity
    assert curve.strengths == (0, 0.5, 1) and curve.prompts == PROMPTS[:2] and curve.seed == 7
    assert curve.likeness[0] == 0 and curve.obedience[0] == 1 and measured.strength == curve.knee
    assert dump(measured.replace(fidelity=None, strength=concept.strength)) == dump(concept) and not concept.fidelity


def test_in_the_demo_likeness_rises_and_obedience_falls_and_it_is_the_same_again(demo):
    measured, _ = measure(demo, "0, .25, .5, .75, 1", "\n".join(PROMPTS))
    rise, fall = measured.fidelity.likeness, measured.fidelity.obedience
    assert all(a < b for a, b in zip(rise, rise[1:])) and all(a > b for a, b in zip(fall, fall[1:]))
    again, _ = measure((*demo[:4], demo[4].raw(0.9, 0.3), demo[5]), "1, .75, .5, .25, 0", "\n".join(PROMPTS))
    assert again.fidelity == measured.fidelity and again.bias is None


def test_the_numbers_are_those_of_the_tower_as_transformers_has_it(demo):
    from transformers import CLIPVisionModel

    vision, photo = demo[3], demo[5]
    measured, pictures = measure(demo)
    tower = CLIPVisionModel.from_pretrained(DEMO / "vision", torch_dtype=torch.float32)
    width = vision.model.visual_projection.weight.shape[0]  # the demo's projection is a cut
    of = [tower(prepare((x * 255).round() / 255, 128), output_hidden_states=True)
          for x in (pictures.flatten(0, 1), photo)]
    vectors, photos = (out.pooler_output[:, :width] for out in of)
    means = of[0].hidden_states[-2].mean(1)
    for found, expected in ((measured.fidelity.likeness, likeness(vectors.unflatten(0, (3, 2)), photos)),
                            (measured.fidelity.obedience, obedience(means.unflatten(0, (3, 2))))):
        torch.testing.assert_close(torch.tensor(found), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("moment", ("before", "between", "within", "looking"))
def test_a_cancel_ends_it_and_leaves_the_model_as_it_was(demo, moment):
    model, vision, heard = demo[0], demo[3], []
    before = weights(model)[0]

    def cancel(*_):
        memory.interrupt_current_processing(True)

    def drew(made, done, total):
        heard.append(done)
        if moment == "between":
            cancel()

    module = {"within": model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_v,
              "looking": vision.model}.get(moment)
    hook = module and module.register_forward_pre_hook(cancel)
    if moment == "before":
        cancel()
    try:
        with pytest.raises(memory.InterruptProcessingException):
            measure(demo, drew=drew)
    finally:
        if hook:
            hook.remove()
        memory.interrupt_current_processing(False)
    assert len(heard) == (1 if moment == "between" else len(heard)) < 6
    assert all(torch.equal(t, before[name]) for name, t in model.model.state_dict().items()) and not swapped(model)


# Other towers as the host has them, small and random: neither has a projection, SigLIP has no class token.
SIZE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": 14}
DINO = SIZE | {"model_type": "dinov2", "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "image_size": 518,
               "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIGLIP = SIZE | {"model_type": "siglip_vision_model", "intermediate_size": 64, "hidden_act": "gelu_pytorch_tanh",
                 "num_channels": 3, "image_size": 56, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize("kind, config", [("sd1", DINO), ("sdxl", SIGLIP)], ids=["sd1-dino", "sdxl-siglip"])
def test_other_families_and_other_towers_do_too(tiny, world, kind, config):
    w, (_, _, vae), heard = world(kind), tiny(kind), []
    measured, pictures = fidelity_comfy.measure(
        w.model, w.clip, vae, made_tower(config), w.cat, torch.rand(2, 64, 96, 3), "0, 1", "a {} here\na {} there", 1,
        64, lambda *now: heard.append(now[1:]))
    assert pictures.shape[:2] == (2, 2) and heard[-1] == (4, 4) and measured.strength == 1
    assert measured.fidelity.tower != fidelity_comfy.tower_hash(made_tower(config, seed=1))
    assert parse(dump(measured), "mimi").fidelity == measured.fidelity


def made_tower(config, seed=0):
    """A vision model of the host's with random weights."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # 0.3.64 takes no dictionary
        json.dump(config, file)
        file.flush()
        vision = ClipVisionModel(file.name)
    generator = torch.Generator().manual_seed(seed)
    vision.load_sd({name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in vision.get_sd().items()})
    return vision


def test_a_concept_that_the_model_carries_already_takes_no_part(demo):
    model, clip, *rest = demo
    plain, _ = measure(demo)
    carrying, _ = apply(None, demo[4].replace(word="<ted>"), model=model, clip=clip)
    assert measure((carrying, clip, *rest))[0].fidelity == plain.fidelity


@pytest.mark.parametrize("changes, words", [
    ({"strengths": ".25, 1"}, "begin at 0, the plain model"),
    ({"strengths": "half"}, "'half' is no strength"),
    ({"prompts": "a creature\na {}"}, "Each prompt has to hold {}"),
    ({"prompts": "a {}"}, "needs two different prompts"),
    ({"strengths": "0-1 [40]"}, "40 strengths of 2 prompts are 80 pictures; it may be 64"),
    ({"images": torch.rand(1, 64, 64, 4)}, "has 4 channels and 3 were expected"),
    ({"clip_vision": torch.nn.Linear(1, 1)}, "A CLIP vision model was expected and Linear came"),
])
def test_bad_input_gets_a_sentence_before_any_picture(demo, changes, words):
    def drew(*_):
        raise AssertionError("a picture was drawn")

    with pytest.raises(ValueError, match=words):
        measure(demo, drew=drew, **changes)


def test_other_models_nothing_learnt_and_numbers_that_are_none_are_told(demo, world):
    model, clip, vae, vision, concept, photo = demo
    with pytest.raises(ValueError, match="was made for the creature demo.*SD1.5"):
        measure((world().model, world().clip, *demo[2:]))
    blank = concept.replace(training=concept.training | {"steps": 0, "far": 1, "pictures": 1})
    with pytest.raises(ValueError, match="Nothing was learnt of <mimi>"):
        measure(demo, concept=blank)
    with pytest.raises(ValueError, match="vision model answers with values that are no numbers"):
        measure(demo, images=torch.full_like(photo, float("nan")))
    broken = concept.replace(target_output={name: o * float("nan") for name, o in concept.target_output.items()})
    with pytest.raises(ValueError, match="pictures are no numbers"):
        measure(demo, concept=broken)


def test_gate_strength_takes_what_the_curve_has_found_over_in_auto(demo, pack):
    measured, _ = measure(demo, prompts=TWO)
    dial = pack["PerfusionGateStrength"].execute
    auto = dial(measured, 0.1, "auto", 0.7, 0.1)
    assert auto.result[0].strength == measured.fidelity.knee != 0.1 and auto.result[0].bias is None
    told = auto.ui["perfusion_gate"][0]
    assert told["carried"] == told["scale"] == measured.strength
    assert told["fidelity"]["likeness"] == measured.fidelity.likeness
    assert dial(measured, 0.1, "slider", 0.7, 0.1).result[0].strength == 0.1
    assert dial(measured, 0.1, "raw", 0.4, 0.2).result[0].bias == 0.4
    assert dial(demo[4].replace(bias=0.2), 0.1, "auto", 0.7, 0.1).result[0].strength == 0.75
    assert dial(demo[4], 0.1, "slider", 0.7, 0.1).ui["perfusion_gate"][0]["fidelity"] is None


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def test_on_a_server_the_sheet_is_shown_and_the_file_has_curve_strength_and_cover(tmp_path):
    graph = {
        "1": node("PerfusionDemoModel"), "2": node("PerfusionDemoPicture", picture="mimi"),
        "3": node("PerfusionLoadDomain", domain_name="creature.safetensors"),
        "4": node("PerfusionEncodeConcept", domain=["3", 0], model=["1", 0], clip=["1", 1], vae=["1", 2],
                  clip_vision=["1", 3], image=["2", 0], superclass="creature", word="<mimi>"),
        "5": node("PerfusionFidelityCurve", model=["1", 0], clip=["1", 1], vae=["1", 2], clip_vision=["1", 3],
                  concept=["4", 0], image=["2", 0], strengths="0, .5, 1", prompts=TWO, seed=7, resolution=128),
        "6": node("PerfusionSaveConcept", concept=["5", 0], name="mimi"),
        "7": node("PreviewImage", images=["5", 1]),
    }
    with serving(tmp_path) as server:
        status, outputs, errors = server.run(graph)
        assert status == "success", errors
        assert outputs["5"]["images"] and outputs["7"]["images"]
        _, _, errors = server.run(graph | {"5": node("PerfusionFidelityCurve", **graph["5"]["inputs"] | {
            "prompts": "a creature\na cat"})})
        assert "Each prompt has to hold {}" in str(errors)
    kept = load(tmp_path / "output" / "perfusion" / "mimi.safetensors")
    assert kept.fidelity.strengths == (0, 0.5, 1) and kept.strength == kept.fidelity.knee and kept.cover
