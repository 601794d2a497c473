"""Small edits in fp64, and what the projections under them answer."""

import pytest
import torch

from perfusion.core.key_lock import Edit, direction, edited, joint, overlap

S = torch.tensor([[2, 0.2, 0], [0.2, 3, 0], [0, 0, 4]], dtype=torch.float64)  # C⁻¹
W = torch.tensor([[1, 2, 0], [0, -1, 3]], dtype=torch.float64)


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, tensor(b).to(a), rtol=0, atol=tolerance)


def edit_of(i, o, S=S, bias=(0.7,), temperature=(0.15,), key_input=None, present=None):
    """The edit of concepts i (j, d) with outputs o (j, d_out) of one value projection, `to_v`; all present."""
    i, o = tensor(i), tensor(o)
    d = torch.stack([direction(S, row)[0] for row in i])
    return Edit(
        target_input=i,
        key_input=i if key_input is None else tensor(key_input),
        direction=d,
        bias=tensor(bias).expand(len(i)),
        temperature=tensor(temperature).expand(len(i)),
        target_output={"to_v": o},
        present=torch.ones(1, len(i)).double() if present is None else tensor(present),
        joint=joint(overlap(d, i)),
    )


def single(edit):
    """The same edit in fp32, as it runs in production."""
    whole = {name: getattr(edit, name) for name in Edit.__dataclass_fields__ if name != "target_output"}
    fields = {name: field.float() if torch.is_tensor(field) else field for name, field in whole.items()}
    return Edit(target_output={name: o.float() for name, o in edit.target_output.items()}, **fields)


def projection(weight):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    return linear.requires_grad_(False)


def answers(edit, x, weight=W):
    """What an edited key and an edited value projection of one weight say to x."""
    key, value = projection(weight), projection(weight)
    with edited({"to_k": key, "to_v": value}, edit):
        return key(x), value(x)


@pytest.fixture
def world():
    """Random and reproducible: C⁻¹ of width 6, W (5, 6), three concepts, x (4, 7, 6)."""
    r = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    root = normal(6, 6)
    return {"S": root @ root.T + 0.5 * torch.eye(6), "W": normal(5, 6), "i": normal(3, 6), "o": normal(3, 5),
            "x": normal(4, 7, 6)}


BIAS, TEMPERATURE = (0.6, 0.75, 0.4), (0.1, 0.15, 0.2)


@pytest.fixture
def three(world):
    """The edit of the world's three concepts."""
    return edit_of(world["i"], world["o"], world["S"], BIAS, TEMPERATURE)
