"""The edit against published numbers, and against another implementation.

Spec: 2305.01644, eqs. 3 and 4. Numbers A and B were worked out by hand in fp64.
"""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

from perfusion.core.key_lock import direction, gate, overlap

import edits
from edits import S, W, answers, close, edit_of, projection, single, tensor

world = edits.world  # a fixture

A = {"i": [[1, 1, 0]], "o": [[5, -7]], "bias": [0.75], "temperature": [0.1]}
A_ROWS = [  # e, similarity, gate, W e⊥ + g o*
    ((1, 1, 0), 1, 0.92414182, (4.62070910, -6.46899274)),
    ((0, 0, 1), 0, 0.00055278, (0.00276389, 2.99613055)),
    ((3.2, -2.2, 0), 0, 0.00055278, (-1.19723611, 2.19613055)),
    ((1, 2, 3), 1.59259259, 0.99978094, (5.22112690, 1.59412604)),
]
B = {"i": [[1, 0, 0], [1, 1, 0]], "o": [[5, 6], [7, 8]], "bias": [0.6, 0.75], "temperature": [0.1, 0.15]}
B_ROWS = [  # e, similarities, gates, e⊥, W e⊥ + Σ g o*
    ((1, 2, 3), (1.2, 1.59259259), (0.99752738, 0.99637866), (0, 0, 3), (11.96228752, 22.95619356)),
    ((2, 1, 1), (2.1, 1.40740741), (0.99999969, 0.98766272), (0, 0, 1), (11.91363754, 16.90129996)),
    ((0, 3, 2), (0.3, 1.77777778), (0.04742587, 0.99894362), (0, 0, 2), (7.22973472, 14.27610421)),
]


# Published numbers


@pytest.mark.parametrize("scale", [1, 7.3])
@pytest.mark.parametrize("e, similarity, g, h", A_ROWS)
def test_one_concept_gives_the_numbers_worked_out_by_hand(e, similarity, g, h, scale):
    edit, e = edit_of(A["i"], A["o"], S * scale, A["bias"], A["temperature"]), tensor([[e]])
    d, energy = direction(S * scale, tensor(A["i"][0]))
    assert energy == pytest.approx(5.4 * scale)
    close(e[0] @ d, [similarity])
    close(gate(e[0] @ d, 0.75, 0.1), [g])
    close(edit(e)[2][0, 0], [g])
    close(answers(edit, e)[1][0, 0], h)
    close(answers(single(edit), e.float(), W.float())[1][0, 0], h, 1e-5)


@pytest.mark.parametrize("e, similarities, gates, rest, h", B_ROWS)
def test_two_concepts_give_the_numbers_worked_out_by_hand(e, similarities, gates, rest, h):
    edit, e = edit_of(B["i"], B["o"], S, B["bias"], B["temperature"]), tensor([[e]])
    energies = [direction(S, i)[1] for i in tensor(B["i"])]
    close(overlap(edit.direction, edit.target_input) * tensor(energies)[:, None], [[2, 2.2], [2.2, 5.4]])
    close((e @ edit.direction.T)[0, 0], similarities)
    keys, values, g = edit(e)
    close(g[0, 0], gates)
    close(values[0, 0], rest)
    close(keys[0, 0], tensor(rest) + tensor(gates) @ edit.key_input)
    close(answers(edit, e)[1][0, 0], h)
    close(answers(single(edit), e.float(), W.float())[1][0, 0], h, 1e-5)


def test_the_projection_is_not_the_approximate_one_of_the_reference_code():
    edit = edit_of(B["i"], B["o"], S, B["bias"], B["temperature"])
    e = tensor([[[1, 2, 3]]])
    close((e - (e @ edit.direction.T) @ edit.target_input)[0, 0], [-1.79259259, 0.40740741, 3])
    assert (edit(e)[1][0, 0] - tensor([-1.79259259, 0.40740741, 3])).abs().max() > 0.4


# Against another implementation


@pytest.fixture(scope="module")
def theirs():
    """What perfusion-pytorch defines, from its own source: all of its file but what needs open_clip."""
    spec = importlib.util.find_spec("perfusion_pytorch")
    if spec is None:
        pytest.skip("perfusion-pytorch, the other implementation, is not installed")
    path = Path(spec.origin).with_name("perfusion.py")
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if "OpenClipAdapter" not in ast.unparse(node)]
    space = {"__name__": "perfusion_pytorch_peer", "__file__": str(path)}
    exec(compile(tree, path.name, "exec"), space)
    return space


def peer(theirs, world, target_input, target_output, is_key=False, bias=0.7, temperature=0.15):
    """Their projection, as if it had learnt one concept of i* (d) and o* (d_out)."""
    module = theirs["Rank1EditModule"](
        projection(world["W"]), C=torch.linalg.inv(world["S"]), text_seq_len=7,
        is_key_proj=is_key, eval_beta=bias, eval_temperature=temperature,
    ).double().eval()
    module.initted.fill_(True)
    module.ema_concept_text_encs.copy_(target_input)
    module.concept_outputs.data.copy_(target_output)
    return module


@pytest.mark.parametrize("bias, temperature", [(0.70, 0.15), (0.75, 0.10), (0.40, 0.15)])
def test_one_concept_equals_the_other_implementation(theirs, world, bias, temperature):
    i, o, key_input = world["i"][:1], world["o"][:1], world["i"][1:2]
    edit = edit_of(i, o, world["S"], [bias], [temperature], key_input)
    key, value = answers(edit, world["x"], world["W"])
    with torch.no_grad():
        their_key = peer(theirs, world, i, key_input @ world["W"].T, True, bias, temperature)(world["x"])
        their_value = peer(theirs, world, i, o, False, bias, temperature)(world["x"])
    close(key, their_key, 1e-9)
    close(value, their_value, 1e-9)


def test_concepts_orthogonal_to_each_other_equal_the_other_implementation(theirs, world):
    """Its projection onto several is approximate; there, and only there, it is exact."""
    L = torch.linalg.cholesky(world["S"])
    i = torch.linalg.solve(L.T, torch.linalg.qr(L.T @ world["i"].T)[0]).T
    merged = theirs["merge_rank1_edit_modules"](*(peer(theirs, world, *io) for io in zip(i, world["o"], strict=True)))
    with torch.no_grad():
        their_value = merged(world["x"], concept_id=(0, 1, 2))
    close(answers(edit_of(i, world["o"], world["S"]), world["x"], world["W"])[1], their_value, 1e-9)
