"""Domains in ComfyUI on tiny checkpoints: trained, encoded with, refused; and that the tower is transformers' own."""

from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfy.clip_vision import ClipVisionModel
from transformers import CLIPVisionConfig, CLIPVisionModel

from perfusion.core import domain as domains
from perfusion.core import domain_comfy
from perfusion.core.concept import dump
from perfusion.core.domain import parse
from perfusion.core.encoder import Encoder
from perfusion.core.host_comfy import tower_of
from perfusion.core.school import Schooling
from perfusion.core.tower import of_transformers, tokens_of

pytestmark = pytest.mark.host

MIMI = "<mimi>"
KINDS = "sd1", "sd2-v", "sdxl"
PICTURES = torch.rand(3, 64, 80, 3, generator=torch.Generator().manual_seed(7))
FAST = Schooling(steps=2, batch=2)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """(CLIP_VISION, the same as a Tower of transformers)."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, hidden_size=32, intermediate_size=64,
                                             num_hidden_layers=4, num_attention_heads=2, hidden_act="gelu")).eval()
    model.half().float()  # as the host may keep them
    model.save_pretrained(folder)
    vision = ClipVisionModel(str(folder / "config.json"))
    state = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in model.state_dict().items()}
    missing, unknown = vision.load_sd(state)
    assert not unknown and all("visual_projection" in name for name in missing)
    return vision, of_transformers(model)


@pytest.fixture(scope="module")
def trained(tiny, towers, tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            folder, parts = tmp_path_factory.mktemp(kind), tiny(kind)
            (folder / "captions.txt").write_text("\n".join(f"a {a} {b}" for a in ("red", "big", "old", "small")
                                                           for b in ("cat", "dog", "tree", "house", "hat")))
            before = [p.clone() for p in parts[0].model.parameters()]
            domain = domain_comfy.train_domain(*parts, towers[0], PICTURES, "cat", FAST, 64, folder,
                                               lambda done, total: None, lambda schooled: None, pytest.fail)
            assert all(torch.equal(a, b) for a, b in zip(before, parts[0].model.parameters()))
            made[kind] = parts, folder, domain
        return made[kind]

    return get


def encode(parts, folder, domain, vision, images=PICTURES[:1], mask=None, superclass="cat", word=MIMI):
    return domain_comfy.encode_concept(domain, *parts, vision, images, superclass, word, mask, folder,
                                       lambda done, total: None)


def test_class_tokens_and_hash_are_those_of_transformers(towers):
    vision, theirs = towers
    ours = tower_of(vision)
    assert ours.size == theirs.size and ours.hash == theirs.hash
    found = [tokens_of(tower, PICTURES, Encoder.read) for tower in (ours, theirs)]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_domain_is_trained_and_a_picture_encoded_with_it(trained, towers, kind):
    parts, folder, domain = trained(kind)
    assert domain.training["steps"] == 2 and domain.training["pictures"] == 3
    assert all(layer.weight.abs().max() > 0 for layer in domain.encoder.values.values())
    concept = encode(parts, folder, parse(domains.dump(domain), "x"), towers[0])
    assert concept.base == kind.split("-")[0] and concept.training["steps"] == 0
    assert dump(encode(parts, folder, parse(domains.dump(domain), "x"), towers[0])) == dump(concept)


def test_what_lies_outside_the_mask_does_not_count(trained, towers):
    parts, folder, domain = trained("sd1")
    mask = torch.zeros(1, 64, 80)
    mask[:, 16:48, 16:64] = 1
    other = PICTURES[:1].clone()
    other[:, :16] = 0
    assert dump(encode(parts, folder, domain, towers[0], other, mask)) == dump(
        encode(parts, folder, domain, towers[0], mask=mask))
    assert dump(encode(parts, folder, domain, towers[0], other)) != dump(encode(parts, folder, domain, towers[0]))


def test_a_cancel_keeps_what_was_learnt(tiny, towers, tmp_path):
    kept = []

    def stop(schooled):
        if schooled.step == 2:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        domain_comfy.train_domain(*tiny("sd1"), towers[0], PICTURES, "cat", Schooling(steps=5, batch=1), 64, tmp_path,
                                  lambda done, total: None, stop, kept.append)
    assert len(kept) == 1 and kept[0].training["steps"] == 2


@pytest.mark.parametrize("good, says", [(0, "Nothing was learnt yet"), (1, "What was learnt before is saved")])
def test_a_loss_that_is_no_number_says_what_can_be_done_in_the_node(tiny, towers, tmp_path, good, says):
    parts, kept = tiny("sd1"), []

    def spoil(schooled=None):
        parts[0].model.diffusion_model.out[2].bias.data.fill_(torch.nan)

    if not good:
        spoil()
    with pytest.raises(ValueError, match=f"stopped at step {good + 1}: the loss is not a number. {says}") as caught:
        domain_comfy.train_domain(*parts, towers[0], PICTURES, "cat", Schooling(steps=3, batch=1), 64, tmp_path,
                                  lambda done, total: None, spoil, kept.append)
    assert [domain.training["steps"] for domain in kept] == [1] * good
    assert "larger batch" in str(caught.value) and "--fp32-unet" in str(caught.value)


def test_what_does_not_fit_gets_a_sentence(trained, tiny, towers):
    parts, folder, domain = trained("sd1")
    with pytest.raises(ValueError, match="trained on SD1.5 and the connected model is SDXL"):
        encode(tiny("sdxl"), folder, domain, towers[0])
    with pytest.raises(ValueError, match="another vision tower"):
        encode(parts, folder, replace(domain, tower="0123"), towers[0])
    with pytest.raises(ValueError, match="of the superclass 'cat', and 'dog' was given"):
        encode(parts, folder, domain, towers[0], superclass="dog")
    with pytest.raises(ValueError, match="predicts v, and the connected one predicts eps"):
        encode(parts, folder, replace(domain, prediction="v"), towers[0])
    with pytest.raises(ValueError, match="Connect Load Image"):
        encode(parts, folder, domain, towers[0], PICTURES[:0])
    with pytest.raises(ValueError, match="angle brackets"):
        encode(parts, folder, domain, towers[0], word="mimi")

    class Siglip:
        model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="without a class token"):
        encode(parts, folder, domain, Siglip())


def test_where_memory_is_short_the_same_is_learnt_with_blocks_computed_again(trained, tiny, towers, monkeypatch):
    _, folder, domain = trained("sd1")
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *a, **k: 0)
    again = domain_comfy.train_domain(*tiny("sd1"), towers[0], PICTURES, "cat", FAST, 64, folder,
                                      lambda done, total: None, lambda schooled: None, pytest.fail)
    for name, layer in again.encoder.values.items():
        torch.testing.assert_close(layer.weight, domain.encoder.values[name].weight, atol=1e-5, rtol=1e-3)
