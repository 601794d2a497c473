"""The edit with another concept in each row: row by row it is the edit of key_lock.py, and it learns."""

import torch

from perfusion.core import key_lock
from perfusion.core.row_edit import RowEdit

B, N, D, OUT = 3, 7, 12, 5


def drawn():
    """Texts (b, n, d) with a word in each, C⁻¹, projections without bias, and u."""
    r = torch.Generator().manual_seed(0)
    x, at = torch.randn(B, N, D, generator=r), torch.tensor([2, 5, 3])
    C = torch.randn(D, 40, generator=r)
    torch.manual_seed(1)
    modules = {"a.to_k": torch.nn.Linear(D, OUT, bias=False), "a.to_v": torch.nn.Linear(D, OUT, bias=False)}
    return x, at, torch.linalg.inv(C @ C.T / 40), modules, torch.randn(B, OUT, generator=r)


def test_each_row_answers_as_under_the_edit_of_its_own_concept():
    x, at, C_inv, modules, u = drawn()
    with key_lock.edited(modules, RowEdit(x, at, C_inv, {"a.to_v": u})) as meet, torch.no_grad():
        meet(x)
        found = {name: module(x) for name, module in modules.items()}
    for k in range(B):
        i, one = x[k, at[k]], torch.ones(1, 1)
        d, _ = key_lock.direction(C_inv.double(), i)
        o = (modules["a.to_v"].weight @ i + u[k]).detach()
        edit = key_lock.Edit(i[None], i[None], d.float()[None], one[0] * key_lock.TRAIN_BIAS,
                             one[0] * key_lock.TRAIN_TEMPERATURE, {"a.to_v": o[None]}, one, one.expand(2, 1, 1))
        with key_lock.edited(modules, edit), torch.no_grad():
            row = x[k : k + 1]
            for name, module in modules.items():
                torch.testing.assert_close(found[name][k : k + 1], module(row), atol=1e-5, rtol=1e-4)


def test_the_gradient_reaches_what_is_added_and_the_words_own_encoding():
    x, at, C_inv, modules, u = drawn()
    x.requires_grad_(), u.requires_grad_()
    with key_lock.edited(modules, RowEdit(x, at, C_inv, {"a.to_v": u})):
        modules["a.to_v"](x).square().sum().backward()
    assert u.grad.abs().min() > 0 and x.grad[torch.arange(B), at].abs().max() > 0
