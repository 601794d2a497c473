"""E4T's encoder: its shapes, where it starts, and what it makes of class tokens."""

import pytest
import torch

from perfusion.core import encoder as e4t

LAYERS, WIDTH, EMBEDDINGS, VALUES = 3, 10, {"clip_l": 5, "clip_g": 7}, {"a.0.to_v": 4, "b.to_v": 6}


def build(seed=0):
    torch.manual_seed(seed)
    return e4t.Encoder(LAYERS, WIDTH, EMBEDDINGS, VALUES, hidden=16).double()


def tokens(m=4, seed=1):
    r = torch.Generator().manual_seed(seed)
    scale = torch.tensor([.01, 1, 100])[:, None].double()
    return torch.randn(m, LAYERS, WIDTH, generator=r, dtype=torch.float64) * scale + 3 * scale


def awake(encoder):
    """With answers other than zero."""
    for layer in (*encoder.out.values(), *encoder.values.values()):
        torch.nn.init.normal_(layer.weight)
    return encoder


SUPERCLASS = {name: torch.randn(d, generator=torch.Generator().manual_seed(d)).double()
              for name, d in EMBEDDINGS.items()}


def test_a_new_encoder_answers_with_the_superclass_word_and_adds_nothing_to_values():
    E, u = build()(tokens())
    v = e4t.embedding(SUPERCLASS, E)
    assert {name: tuple(t.shape) for name, t in v.items()} == {"clip_l": (4, 5), "clip_g": (4, 7)}
    assert all((v[name] == SUPERCLASS[name]).all() for name in v) and e4t.penalty(SUPERCLASS, E) == 0
    assert {name: tuple(t.shape) for name, t in u.items()} == {"a.0.to_v": (4, 4), "b.to_v": (4, 6)}
    assert not any(t.any() for t in u.values())


def test_it_is_linear_layers_then_the_mean_then_leaky_relu_then_one_more():
    encoder, seen, total = awake(build()), tokens(), 0
    for layer, x in zip(encoder.tower, seen.unbind(1)):
        total = total + torch.einsum("bw, hw -> bh", x, layer.weight) + layer.bias
    h = total / 3
    h = torch.maximum(h, .1 * h)
    E, u = encoder(seen)
    for name, layer in encoder.out.items():
        torch.testing.assert_close(E[name], h @ layer.weight.T + layer.bias)
    torch.testing.assert_close(u["a.0.to_v"], h @ encoder.values["a/0/to_v"].weight.T)


def test_the_penalty_is_of_the_offset_beside_the_word_and_a_mean_over_the_batch():
    encoder, seen = awake(build()), tokens()
    E, _ = encoder(seen)
    twice, _ = encoder(torch.cat([seen, seen]))
    torch.testing.assert_close(e4t.penalty(SUPERCLASS, E), e4t.penalty(SUPERCLASS, twice))
    v = e4t.embedding(SUPERCLASS, E)
    shares = [(v[name] - SUPERCLASS[name]).norm(dim=-1) / SUPERCLASS[name].norm() for name in v]
    torch.testing.assert_close(e4t.penalty(SUPERCLASS, E), sum((share**2).mean() for share in shares).float())
    larger = {name: 3 * t for name, t in SUPERCLASS.items()}  # a text encoder whose words are three times as long
    torch.testing.assert_close(9 * e4t.penalty(larger, E), e4t.penalty(SUPERCLASS, E))


def test_standardised_layers_answer_alike_to_tokens_of_any_place_and_size():
    seen, found = tokens(200), []
    for x in (seen, 50 * seen - 7):
        encoder = build()
        encoder.standardise(x)
        found.append([layer(f) for layer, f in zip(encoder.tower, x.unbind(1))])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
        assert .2 < one.std() < 2 and one.mean().abs() < .5


def test_features_of_another_tower_are_refused():
    with pytest.raises(ValueError):
        build()(tokens()[:, :2])


def test_at_full_size_it_has_the_numbers_that_its_page_says():
    widths = [320 * 2 ** min(k, 2) for k in (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0)]
    with torch.device("meta"):
        encoder = e4t.Encoder(16, 1280, {"clip_l": 768}, {f"{k}.to_v": d for k, d in enumerate(widths)})
    count = sum(p.numel() for p in encoder.parameters())
    assert round(count / 1e6, 1) == 43.2 and round(count * 2 / 2**20) == 82
