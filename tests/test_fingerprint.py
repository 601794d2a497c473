"""One hash for all that a result depends on."""

import time

import pytest
import torch

from perfusion.core.fingerprint import exact, fingerprint

WEIGHT = torch.rand(300, 70, generator=torch.Generator().manual_seed(0))


class Adapter:
    def __init__(self, *weights):
        self.weights = weights


def double(weight):
    return 2 * weight


def test_it_is_a_sha256_in_hex():
    assert len(fingerprint("cat", 1)) == 64 and int(fingerprint("cat", 1), 16)


def test_the_order_of_keys_does_not_matter_and_that_of_lists_does():
    other_order = {"b": {"y": 2, "x": 1}, "a": WEIGHT.clone()}
    assert fingerprint({"a": WEIGHT, "b": {"x": 1, "y": 2}}) == fingerprint(other_order)
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint((1, 2)) == fingerprint([1, 2])


@pytest.mark.parametrize("one, other", (
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"b": 1}),
    ([WEIGHT], [WEIGHT * 1.001]),
    (WEIGHT, WEIGHT.half()),
    (WEIGHT.half(), WEIGHT.bfloat16()),
    (WEIGHT, WEIGHT.T.contiguous()),
    (torch.zeros(4, 6), torch.zeros(6, 4)),
    (torch.zeros(3), torch.zeros(3, 1)),
    (torch.zeros(()), torch.ones(())),
    (torch.zeros(0), torch.zeros(0, 1)),
    (1, 1.0), (1, True), (1, "1"), (None, "None"), ("", None), (b"a", "a"), ([], {}),
    (["ab", "c"], ["a", "bc"]), ([["a"], "b"], ["a", ["b"]]),
    ([{"a": 1}, {"b": 2}], [{"a": 1, "b": 2}, {}]),
    (double, fingerprint),
    (Adapter(WEIGHT, 1.0, None), Adapter(WEIGHT, 0.5, None)),
    ([(1.0, Adapter(WEIGHT), 1.0, None, None)], [(0.5, Adapter(WEIGHT), 1.0, None, None)]),
))
def test_a_change_changes_it(one, other):
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)


def test_where_one_part_ends_and_the_next_begins_counts():
    assert len({fingerprint({"a": 1}, {"b": 2}), fingerprint({"a": 1, "b": 2}), fingerprint({"a": 1, "b": 2}, {}),
                fingerprint({}, {"a": 1, "b": 2})}) == 4


def test_layout_in_memory_and_inference_do_not_matter():
    with torch.inference_mode():
        inside = WEIGHT.clone()
    parameter = torch.nn.Parameter(WEIGHT.clone())
    assert fingerprint(WEIGHT) == fingerprint(WEIGHT.T.contiguous().T) == fingerprint(inside) == fingerprint(parameter)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool))
def test_every_kind_of_number_has_one(dtype):
    weight = (WEIGHT * 100).to(dtype)
    assert fingerprint(weight) == fingerprint(weight.clone()) != fingerprint((WEIGHT * 0).to(dtype))


def test_big_tensors_are_read_at_strides():
    big = [torch.zeros(4096, 4096, dtype=torch.float16) for _ in range(8)]
    begun = time.perf_counter()
    first = fingerprint(big)
    assert time.perf_counter() - begun < 0.1
    big[7] += 1
    assert fingerprint(big) != first


def test_exact_sees_one_value_in_a_million():
    picture = torch.rand(1, 600, 600, 3, generator=torch.Generator().manual_seed(0))
    other = picture.clone()
    other[0, 333, 101, 1] += 1e-6
    assert exact(picture) == exact(picture.clone()) != exact(other)
    assert len({exact(t) for t in (picture, picture.half(), picture[0], torch.zeros(0), torch.zeros(()))}) == 5
