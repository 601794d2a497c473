"""E4T's encoder: its shapes, where it starts, and what standardising leaves alone."""

import pytest
import torch

from perfusion.core import encoder as e4t

LAYERS, WIDTH, BLOCKS, EMBEDDINGS = 3, 10, (6, 8), {"clip_l": 5, "clip_g": 7}


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return e4t.Encoder(LAYERS, WIDTH, BLOCKS, EMBEDDINGS, hidden=16, **changes).double()


def features(m=4, seed=1):
    r = torch.Generator().manual_seed(seed)
    scale = torch.tensor([.01, 1, 100])[:, None].double()
    seen = torch.randn(m, LAYERS, WIDTH, generator=r, dtype=torch.float64) * scale + 3 * scale
    return seen, [torch.randn(m, width, generator=r, dtype=torch.float64) for width in BLOCKS]


def awake(encoder):
    """With answers other than zero."""
    for layer in encoder.out.values():
        torch.nn.init.normal_(layer.weight)
    return encoder


def test_a_new_encoder_answers_with_the_superclass_word():
    E = build()(*features())
    superclass = {name: torch.randn(d, dtype=torch.float64) for name, d in EMBEDDINGS.items()}
    v = e4t.embedding(superclass, E)
    assert {name: tuple(t.shape) for name, t in v.items()} == {"clip_l": (4, 5), "clip_g": (4, 7)}
    assert all((v[name] == superclass[name]).all() for name in v) and e4t.penalty(E) == 0


def test_it_is_linear_layers_then_the_mean_then_leaky_relu_then_one_more():
    encoder = awake(build())
    seen, felt = features()
    total = 0
    for k, x in enumerate((*seen.unbind(1), *felt)):
        layer = (*encoder.tower, *encoder.unet)[k]
        total = total + torch.einsum("bw, hw -> bh", x, layer.weight) + layer.bias
    h = total / 5
    h = torch.maximum(h, .1 * h)
    for name, E in encoder(seen, felt).items():
        torch.testing.assert_close(E, h @ encoder.out[name].weight.T + encoder.out[name].bias)


def test_the_penalty_is_a_mean_over_the_batch_and_the_offset_a_tenth():
    encoder = awake(build())
    seen, felt = features()
    E = encoder(seen, felt)
    twice = encoder(torch.cat([seen, seen]), [torch.cat([x, x]) for x in felt])
    torch.testing.assert_close(e4t.penalty(E), e4t.penalty(twice))
    nothing = {name: torch.zeros(d) for name, d in EMBEDDINGS.items()}
    torch.testing.assert_close(e4t.embedding(nothing, E)["clip_g"] * 10, E["clip_g"])


def test_features_of_another_tower_or_unet_are_refused():
    encoder, (seen, felt) = build(), features()
    with pytest.raises(ValueError):
        encoder(seen[:, :2], felt)
    with pytest.raises(ValueError):
        encoder(seen, felt[:1])


def test_at_full_size_it_has_the_numbers_that_its_page_says():
    with torch.device("meta"):
        encoder = e4t.Encoder(16, 1280, (320, 640, 1280, 1280), {"clip_l": 768})
    count = sum(p.numel() for p in encoder.parameters())
    assert round(count / 1e6, 1) == 31.7 and round(count * 2 / 2**20) == 61
