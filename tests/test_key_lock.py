"""The edit against its definition, and the covariance that it is made under.

Spec: 2305.01644, eqs. 3 and 4. P1 to P15 name the properties that any Perfusion has. What a test calls `definition`
is the equation as printed, with the Gram matrix and a solve.
"""

from dataclasses import replace

import pytest
import torch

from perfusion.core.concept import Concept, dump, parse
from perfusion.core.key_lock import APART, direction, edited, gate, invert, joint, overlap, second_moment, unit

import edits
from edits import BIAS, TEMPERATURE, S, W, answers, close, edit_of, projection, single, tensor

three, world = edits.three, edits.world  # fixtures


def definition(x, i, o, S=S, W=W, bias=(0.7,), temperature=(0.15,)):
    """Eqs. 3 and 4 as printed: (similarities, gates, e⊥, answers) for x (..., d)."""
    i, o, bias, temperature = map(tensor, (i, o, bias, temperature))
    G, p = i @ S @ i.T, x @ S @ i.T
    r = p / G.diagonal()
    g = torch.sigmoid((r - bias) / temperature)
    rest = x - torch.linalg.solve(G, p.mT).mT @ i
    return r, g, rest, rest @ W.T + g @ o


# Properties of the equations


def test_at_the_target_input_the_output_is_the_target_output_times_the_gate(world):  # P1
    i, o, S, W = world["i"][:1], world["o"][:1], world["S"], world["W"]
    edit = edit_of(i, o, S, [0.75], [0.1])
    rest = edit(i[None])[1]
    similarity = i @ edit.direction.T
    close(rest[0] @ W.T + similarity @ o, o, 1e-12)  # a gate that let the similarity through would give o* itself
    close(answers(edit, i[None], W)[1][0], gate(tensor(1), 0.75, 0.1) * o, 1e-12)


def test_what_is_orthogonal_to_the_concept_keeps_its_own_answer(world):  # P2
    i, o, S, W = world["i"][:1], world["o"][:1], world["S"], world["W"]
    edit = edit_of(i, o, S, [0.75], [0.1])
    x = world["x"] - (world["x"] @ edit.direction.T) @ i
    close(answers(edit, x, W)[1], x @ W.T + gate(tensor(0), 0.75, 0.1) * o, 1e-12)


@pytest.mark.parametrize("bias, share", [(1e9, 0), (-1e9, 1)])
def test_a_gate_that_never_opens_erases_the_concept_and_one_always_open_gives_all_of_it(world, bias, share):  # P3
    i, o = world["i"][:1], world["o"][:1]
    close(answers(edit_of(i, o, world["S"], [bias]), i[None], world["W"])[1][0], share * o, 1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1 / 20, 7.3, 1e6])
def test_scaling_the_covariance_changes_nothing(world, three, scale):  # P4
    C = torch.linalg.inv(world["S"])
    scaled = edit_of(world["i"], world["o"], invert(C * scale), BIAS, TEMPERATURE)
    for a, b in zip(scaled(world["x"]), three(world["x"]), strict=True):
        close(a, b, 1e-9)


def test_what_values_read_holds_nothing_of_any_concept(world, three):  # P5
    rest = three(world["x"])[1]
    close(rest @ world["S"] @ world["i"].T, torch.zeros(4, 7, 3), 1e-10)


def test_the_joint_projection_is_the_papers_by_orthogonal_basis(world, three):  # P5: appendix B, eqs. 6 and 10
    L = torch.linalg.cholesky(world["S"])
    basis = torch.linalg.solve(L.T, torch.linalg.qr(L.T @ world["i"].T)[0])  # u, orthonormal under C⁻¹
    close(three(world["x"])[1], world["x"] - (world["x"] @ world["S"] @ basis) @ basis.T, 1e-10)


def test_several_concepts_of_one_are_the_single_edit(world):  # P5
    i, o, S, W, x = world["i"][:1], world["o"][:1], world["S"], world["W"], world["x"]
    edit = edit_of(i, o, S, [0.7], [0.15])
    close(edit.joint[1], torch.eye(1), 1e-12)
    p, energy = x @ S @ i[0], i[0] @ S @ i[0]
    r = (p / energy)[..., None]
    close(answers(edit, x, W)[1], (x - r * i) @ W.T + torch.sigmoid((r - 0.7) / 0.15) * o, 1e-10)


def test_the_order_of_concepts_does_not_matter(world, three):  # P6
    turn = [2, 0, 1]
    other = edit_of(world["i"][turn], world["o"][turn], world["S"], tensor(BIAS)[turn], tensor(TEMPERATURE)[turn])
    for a, b in zip(answers(three, world["x"], world["W"]), answers(other, world["x"], world["W"]), strict=True):
        close(a, b, 1e-10)


def test_concepts_orthogonal_to_each_other_do_not_need_the_joint_projection(world):  # P6
    L = torch.linalg.cholesky(world["S"])
    i = torch.linalg.solve(L.T, torch.linalg.qr(L.T @ world["i"].T)[0]).T * tensor([1, 2, 3])[:, None]
    edit = edit_of(i, world["o"], world["S"])
    close(edit.joint, torch.eye(3).expand(8, 3, 3), 1e-10)
    close(edit(world["x"])[1], world["x"] - (world["x"] @ edit.direction.T) @ i, 1e-10)


def test_the_edit_is_its_definition(world, three):  # P7
    _, g, rest, h = definition(world["x"], world["i"], world["o"], world["S"], world["W"], BIAS, TEMPERATURE)
    for a, b in zip(three(world["x"]), (rest + g @ world["i"], rest, g), strict=True):
        close(a, b, 1e-10)
    close(answers(three, world["x"], world["W"])[1], h, 1e-10)


def test_the_edit_is_an_addition_to_the_plain_answer(world, three):  # P7
    i, W, x = world["i"], world["W"], world["x"]
    G = i @ world["S"] @ i.T
    g, c = three(x)[2], torch.linalg.solve(G, (x @ world["S"] @ i.T).mT).mT
    close(answers(three, x, W)[1], x @ W.T + g @ world["o"] - c @ (i @ W.T), 1e-10)


def test_a_concept_that_learnt_nothing_still_moves_what_the_gate_bends(world):  # P7
    i, W, x = world["i"][:1], world["W"], world["x"]
    edit = edit_of(i, i @ W.T, world["S"])
    g, similarity = edit(x)[2], x @ edit.direction.T
    close(answers(edit, x, W)[1], x @ W.T + (g - similarity) @ (i @ W.T), 1e-10)


def test_keys_locked_to_an_input_answer_as_values_with_that_output(world):
    """o* = W key_input, so with it the key's route, all on the input, and the value's route must agree."""
    key_input = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    edit = edit_of(world["i"], key_input @ world["W"].T, world["S"], BIAS, TEMPERATURE, key_input)
    key, value = answers(edit, world["x"], world["W"])
    close(key, value, 1e-10)


def test_a_token_is_edited_alike_wherever_it_stands(world, three):  # P8
    x = world["x"].clone()
    x[2, 5] = x[0, 1]
    for out in (*three(x), *answers(three, x, world["W"])):
        close(out[2, 5], out[0, 1], 1e-12)
    close(answers(three, x[1:2, 3:4], world["W"])[1][0, 0], answers(three, x, world["W"])[1][1, 3], 1e-12)


def test_learning_reaches_the_target_outputs_and_the_text_encoding_and_nothing_else(world, three):  # P9
    x, o = world["x"].clone().requires_grad_(), world["o"].clone().requires_grad_()
    three.target_output = {"to_v": o}
    weight = projection(world["W"])
    with edited({"to_v": weight}, three):
        weight(x).square().sum().backward()
    assert o.grad.abs().min() > 0 and x.grad.abs().max() > 0
    assert weight.weight.grad is None
    assert all(getattr(three, name).grad is None for name in ("target_input", "key_input", "direction", "joint"))


def test_a_target_output_learns_in_proportion_to_its_gate(world, three):  # P9: dh/do* = g I
    def last(o):
        three.target_output = {"to_v": o}
        return answers(three, world["x"], world["W"])[1][1, 2]

    slope = torch.autograd.functional.jacobian(last, world["o"])  # (d_out, j, d_out)
    g = three(world["x"])[2][1, 2]
    close(slope, torch.einsum("j,ab->ajb", g, torch.eye(5).double()), 1e-12)


def test_the_gradient_to_the_text_encoding_is_that_of_the_function(world, three):  # P9
    x = world["x"][:1, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: answers(three, x, world["W"]), (x,))


def test_concepts_that_point_the_same_way_are_refused_by_number(world):  # P11
    for same in (2 * world["i"][0], -world["i"][0], world["i"][0] * (1 + 1e-9)):
        i = torch.stack([world["i"][1], world["i"][0], world["i"][2], same])
        d = torch.stack([direction(world["S"], row)[0] for row in i])
        with pytest.raises(ValueError, match=r"^Concepts 2 and 4 are the same.*cosine 1\.0.*Remove one"):
            overlap(d, i)


def test_a_mixture_of_other_concepts_is_refused_like_a_copy_of_one():
    i = torch.randn(3, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    i[2] = 0.4 * i[0] - 0.7 * i[1]
    directions = i / (i * i).sum(1, keepdim=True)
    with pytest.raises(ValueError, match="mixture"):
        overlap(directions, i)
    assert torch.isfinite(joint(overlap(directions[:2], i[:2]))).all()


def test_concepts_just_short_of_the_same_way_are_taken_apart_exactly():
    eye = torch.eye(3).double()
    angle = torch.tensor(0.01).double()  # cosine .99995, short of the limit
    i = torch.stack([eye[0], angle.cos() * eye[0] + angle.sin() * eye[1]])
    assert 0.9999 < (i[0] @ i[1]).item() < 1 - APART
    edit = edit_of(i, torch.zeros(2, 2), eye)
    close(edit(tensor([[[3, 4, 5]]]))[1][0, 0], [0, 0, 5], 1e-9)


@pytest.fixture(scope="module")
def clip_like():
    """Text encodings with the spectrum of CLIP-L's (eigenvalues 1.1 to 4434, norm 27.5), width 768."""
    r = torch.Generator().manual_seed(1)
    spectrum = torch.cat([torch.logspace(0.05, 1.9, 765, dtype=torch.float64), tensor([318, 1595, 4434])])
    spectrum *= 27.5**2 / spectrum.sum()
    basis = torch.linalg.qr(torch.randn(768, 768, generator=r, dtype=torch.float64))[0]
    x = torch.randn(78, 768, generator=r, dtype=torch.float64) * spectrum.sqrt() @ basis.T
    inverse = basis / spectrum @ basis.T
    i, x = x[0], x[1:]
    wanted = torch.linspace(0, 1.2, 77, dtype=torch.float64)
    x = x + (wanted - x @ inverse @ i / (i @ inverse @ i))[:, None] * i
    return inverse, i, x[None]  # tokens of every similarity from 0 to 1.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_around_the_edit_hardly_moves_a_gate(clip_like, dtype):  # P15
    """A concept out of its fp16 file, text encodings in half, all else in fp32, against fp64 from end to end."""
    inverse, i, x = clip_like
    d, energy = direction(inverse, i)
    concept = parse(dump(Concept(
        base="sd1", superclass="cat", word="<mimi>", embedding={"clip_l": i.float()}, target_input=i.float(),
        key_input=i.float(), direction=d.float(), target_output={"a.to_v": torch.zeros(2)}, energy=energy,
        covariance="",
    )), "mimi")
    edit = edit_of(i[None], torch.zeros(1, 2), inverse, [0.75], [0.10])
    exact = edit(x)[2]
    assert exact.min() < 0.01 and exact.max() > 0.98 and ((exact > 0.2) & (exact < 0.8)).any()
    low = single(edit)
    low.target_input = concept.target_input[None]
    low.direction = unit(concept.direction[None], low.target_input)
    keys, values, g = low(x.to(dtype))
    assert keys.dtype == values.dtype == dtype and g.dtype == torch.float32
    assert (g - exact).abs().max() < {torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]


# Covariance


def test_the_covariance_is_the_mean_over_all_tokens_of_all_captions():
    r = torch.Generator().manual_seed(3)
    captions = [torch.randn(n, 4, generator=r) for n in (3, 9, 5)]
    C, tokens = second_moment(captions)
    x = torch.cat(captions).double()
    assert tokens == 17 and C.dtype == torch.float64
    close(C, x.T @ x / 17, 1e-12)
    close(invert(C) @ C, torch.eye(4), 1e-10)


def test_a_covariance_of_too_few_captions_is_refused_and_a_ridge_mends_it():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))
    C, _ = second_moment([x])
    with pytest.raises(ValueError, match="more varied, captions"):
        invert(C)
    inverse = invert(C, ridge=1e-3)
    close(inverse, inverse.T, 1e-9)
    close(inverse @ (C + 1e-3 * C.diagonal().mean() * torch.eye(8).double()), torch.eye(8), 1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_part_of_an_edit_is_that_part_of_what_the_whole_changes(world, share):
    S, W, i, o, x = world["S"], world["W"], world["i"], world["o"], world["x"]
    edit = edit_of(i, o, S)
    part = replace(edit, scale=tensor([share] * len(i)))
    for plain, whole, made in zip((x @ W.T,) * 2, answers(edit, x, W), answers(part, x, W)):
        close(made, plain + share * (whole - plain), 1e-9)


def test_concepts_beside_each_other_have_parts_of_their_own(world):
    S, W, i, o, x = world["S"], world["W"], world["i"], world["o"], world["x"]
    whole, first = edit_of(i[:2], o[:2], S), edit_of(i[:1], o[:1], S)
    off = replace(whole, scale=tensor([1.0, 0.0]), joint=torch.eye(2).double().expand(4, 2, 2))
    for made, alone in zip(answers(off, x, W), answers(first, x, W)):
        close(made, alone, 1e-9)
