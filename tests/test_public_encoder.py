"""The public E4T encoder, folded: it answers as the program's own, layer by layer, and comes back from a domain's file.

The oracle is tests/published_e4t.py, in fp64.
"""

import pytest
import torch

from perfusion.core import domain as domains
from perfusion.core.domain import Domain, dump, parse
from perfusion.core.public_encoder import PublicEncoder, fold

import published_e4t as published

WIDTHS = 16, 32, 32  # of the UNet's answers; 80 in all


@pytest.fixture(scope="module")
def theirs():
    return published.encoder()


@pytest.fixture(scope="module")
def ours(theirs):
    return fold(theirs.state_dict())


@pytest.fixture(scope="module")
def inputs():
    r = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, 32, 32, generator=r), [torch.randn(4, w, 3, 5, generator=r) for w in WIDTHS]


def states(visual, x):
    """The hidden states after each layer, as a tower's `states` gives them."""
    found = []
    hooks = [block.register_forward_hook(lambda block, inputs, answer: found.append(answer))
             for block in visual.transformer.resblocks]
    visual(x)
    for hook in hooks:
        hook.remove()
    return found


def pooled(samples):
    return [sample.mean((2, 3)) for sample in samples]


def test_it_answers_as_the_unfolded_one(theirs, ours, inputs):
    x, samples = inputs
    seen = PublicEncoder.read(states(theirs.clip_vision, x))
    assert seen.shape == (4, 9, 32)  # 16 patches: the class token and every second of them
    wanted = theirs.double()(x.double(), [sample.double() for sample in samples])
    theirs.float()
    E = ours(seen, pooled(samples))
    assert list(E) == ["clip_l"] and wanted.std() > 0.1
    torch.testing.assert_close(E["clip_l"].double(), wanted, atol=1e-5, rtol=1e-5)


def test_only_the_class_token_is_normalised_and_the_order_of_tokens_counts(theirs, ours, inputs):
    x, samples = inputs
    seen, felt = PublicEncoder.read(states(theirs.clip_vision, x)), pooled(samples)
    E, louder = ours(seen, felt)["clip_l"], seen.clone()
    louder[:, 0] = 3 * louder[:, 0] + 1
    torch.testing.assert_close(ours(louder, felt)["clip_l"], E, atol=1e-4, rtol=1e-4)
    louder[:, 1] *= 3
    assert (ours(louder, felt)["clip_l"] - E).abs().max() > 1e-3
    assert (ours(seen.flip(1), felt)["clip_l"] - E).abs().max() > 1e-2


def test_it_comes_back_from_a_domains_file(ours, inputs, theirs):
    domain = Domain("sd1", "eps", "face", "0123", ours, {}, {"imported": "x"})
    again = parse(dump(domain), "faces")
    assert type(again.encoder) is PublicEncoder and dump(again) == dump(domain) and again.hash == domain.hash
    assert not any(p.requires_grad for p in again.encoder.parameters())
    x, samples = inputs
    seen, felt = PublicEncoder.read(states(theirs.clip_vision, x)), pooled(samples)
    torch.testing.assert_close(again.encoder(seen, felt), ours(seen, felt), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name, shape", [
    ("tower.weight", (32, 100)), ("tower.weight", (32,)), ("join.bias", None), ("ln_post.bias", None),
    ("ln_post.weight", (0,)), ("out.clip_l.weight", None), ("unet.weight", (31, 80)), ("tower.0.weight", (2, 2)),
])
def test_a_damaged_one_in_a_file_gets_a_sentence(ours, name, shape):
    state = {key: t for key, t in ours.state_dict().items() if key != name}
    state |= {name: torch.zeros(shape)} if shape else {}
    data = domains.pack({f"encoder.{key}": t.half() for key, t in state.items()}, {
        "format": domains.FORMAT, "base": "sd1", "prediction": "eps", "superclass": "face", "tower": "0",
        "training": "{}"})
    with pytest.raises(ValueError, match=r"(?s)encoder in 'x' is damaged.*train the domain again\.$"):
        parse(data, "x")


@pytest.mark.parametrize("change, says", [
    ({"first_linears.8.bias": None}, r"first_linears\.8\.bias should be \(32,\) and is absent\. Give encoder\.pt"),
    ({"first_linears.9.weight": (32, 32)}, r"first_linears\.9\.weight should be absent and is \(32, 32\)"),
    ({"feature_linear.weight": (32, 32)}, r"should be \(32, 64\) and is \(32, 32\)"),
    ({"final_linear.bias": (767,)}, r"should be \(768,\) and is \(767,\)"),
    ({"clip_vision.ln_post.weight": None}, r"ln_post\.weight should be \(32,\) and is absent"),
    ({"clip_vision.positional_embedding": None}, r"positional_embedding should be \(0, 0\) and is absent.*more\. Give"),
    ({"final_linear.weight": (5,)}, r"final_linear\.weight should be"),
    ({"linear.weight": (32, 32)}, r"linear\.weight should be absent"),
])
def test_tensors_of_another_encoder_get_a_sentence(theirs, change, says):
    state = {name: t for name, t in theirs.state_dict().items() if name not in change}
    with pytest.raises(ValueError, match=says):
        fold(state | {name: torch.zeros(shape) for name, shape in change.items() if shape})


def test_at_full_size_it_has_the_numbers_that_its_page_says():
    with torch.device("meta"):
        theirs = published.E4TEncoder(width=1280, heads=16, layers=32, patch=14, size=224, inner=5120, felt=10880)
        state = theirs.state_dict()
        ours = fold(state)
    assert sum(t.numel() for t in state.values()) == 862_114_048
    assert sum(name.startswith("clip_vision.") for name in state) == 391 and len(theirs.first_linears) == 129
    count = sum(p.numel() for p in ours.parameters())
    assert round(count / 1e6, 1) == 227.9 and round(count * 2 / 2**20) == 435 < domains.LARGEST / 2**20
