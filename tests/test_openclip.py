"""OpenCLIP's tower under transformers' names: the same answers, and the same hash by every road."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from perfusion.core.openclip import as_transformers
from perfusion.core.tower import hash_of

import published_e4t as published


@pytest.fixture(scope="module")
def visual():
    return published.encoder().clip_vision


@pytest.fixture(scope="module")
def model(visual):
    """The same tower as transformers has it."""
    made = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, hidden_size=32, intermediate_size=64,
                                            num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu")).eval()
    state = as_transformers(visual.state_dict())
    made.load_state_dict({name: state[name.removeprefix("vision_model.")] for name in made.state_dict()
                          if "position_ids" not in name}, strict=False)
    return made


def test_the_tower_answers_as_transformers_does_with_its_tensors(visual, model):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pooled, tokens = visual(x)
        found = model(x, output_hidden_states=True)
    torch.testing.assert_close(found.hidden_states[-1][:, 1:], tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.pooler_output, pooled, atol=1e-4, rtol=1e-4)


def test_the_hash_is_that_of_the_same_tower_in_transformers(visual, model):
    assert hash_of(as_transformers(visual.state_dict())) == hash_of(model.state_dict())
    other = {name: t + 0.1 for name, t in visual.state_dict().items()}
    assert hash_of(as_transformers(other)) != hash_of(model.state_dict())


def test_nothing_is_copied_but_named(visual):
    state = visual.state_dict()
    theirs = {t.untyped_storage().data_ptr() for t in state.values()}
    assert {t.untyped_storage().data_ptr() for t in as_transformers(state).values()} == theirs


@pytest.mark.parametrize("change", [{"transformer.resblocks.1.ln_1.bias": None}, {"ln_pre.weight": None},
                                    {"proj": (32, 16)}, {"transformer.resblocks.7.ln_1.bias": (32,)}])
def test_what_is_not_all_of_a_tower_gets_a_sentence(visual, change):
    state = {name: t for name, t in visual.state_dict().items() if name not in change}
    state |= {name: torch.zeros(shape) for name, shape in change.items() if shape}
    with pytest.raises(ValueError, match=next(iter(change))):
        as_transformers(state)
