"""The edit against its definition, against published numbers, and against another implementation.

Spec: 2305.01644, eqs. 3 and 4. Numbers A and B were worked out by hand in fp64; P1 to P15 name the properties that
any Perfusion has. What a test calls `definition` is the equation as printed, with the Gram matrix and a solve.
"""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

from perfusion.core.concept import Concept, dump, parse
from perfusion.core.key_lock import (
    APART,
    Edit,
    bias_of,
    direction,
    edited,
    gate,
    invert,
    joint,
    overlap,
    second_moment,
    subset,
    unit,
)

S = torch.tensor([[2, 0.2, 0], [0.2, 3, 0], [0, 0, 4]], dtype=torch.float64)  # C⁻¹
W = torch.tensor([[1, 2, 0], [0, -1, 3]], dtype=torch.float64)

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
    fields = {name: getattr(edit, name).float() for name in Edit.__dataclass_fields__ if name != "target_output"}
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


def definition(x, i, o, S=S, W=W, bias=(0.7,), temperature=(0.15,)):
    """Eqs. 3 and 4 as printed: (similarities, gates, e⊥, answers) for x (..., d)."""
    i, o, bias, temperature = map(tensor, (i, o, bias, temperature))
    G, p = i @ S @ i.T, x @ S @ i.T
    r = p / G.diagonal()
    g = torch.sigmoid((r - bias) / temperature)
    rest = x - torch.linalg.solve(G, p.mT).mT @ i
    return r, g, rest, rest @ W.T + g @ o


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


# Which rows, how much


@pytest.mark.parametrize("j", [1, 2, 3, 4])
def test_the_table_solves_every_subset_and_leaves_the_others_out(j):
    r = torch.Generator().manual_seed(j)
    i = torch.randn(j, 6, generator=r, dtype=torch.float64)
    d = torch.stack([direction(torch.eye(6).double(), row)[0] for row in i])
    M = overlap(d, i)
    table = joint(M)
    assert table.shape == (2**j, j, j)
    s = torch.randn(j, generator=r, dtype=torch.float64)
    for members in torch.cartesian_prod(*[torch.arange(2)] * j).reshape(-1, j):
        inside = members.nonzero()[:, 0]
        c = table[subset(members[None])[0]] @ (s * members)
        close(c[inside], torch.linalg.solve(M[inside][:, inside], s[inside]), 1e-9)
        assert torch.equal(c[members == 0], torch.zeros(j - len(inside)).double())


def test_every_subset_has_an_index_of_its_own_whatever_the_weights():
    present = torch.cartesian_prod(*[torch.tensor([0.0, 1.3])] * 3)
    assert sorted(subset(present).tolist()) == list(range(8))
    assert torch.equal(subset(present), subset(-0.2 * present))


def test_a_row_is_edited_for_the_concepts_it_names_and_no_other(world):
    rows = [[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]]
    edit = edit_of(world["i"], world["o"], world["S"], BIAS, TEMPERATURE, present=rows)
    key, value = answers(edit, world["x"], world["W"])
    for row, named in enumerate(tensor(rows).bool()[:3]):
        pick = [world["i"][named], world["o"][named], world["S"], tensor(BIAS)[named], tensor(TEMPERATURE)[named]]
        alone = answers(edit_of(*pick), world["x"][row:row + 1], world["W"])
        close(key[row], alone[0][0], 1e-10)
        close(value[row], alone[1][0], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_row_that_names_no_concept_is_untouched_to_the_bit(world, three, dtype):
    edit = single(three)
    edit.present = torch.tensor([[1.0, 1, 1], [0, 0, 0], [0, 1.2, 0], [0, 0, 0]])
    x, weight = world["x"].to(dtype), world["W"].to(dtype)
    edit = edit if dtype != torch.float64 else Edit(
        **{name: getattr(three, name) for name in Edit.__dataclass_fields__} | {"present": edit.present.double()})
    plain = projection(weight)(x)
    for out in answers(edit, x, weight):
        assert torch.equal(out[1], plain[1]) and torch.equal(out[3], plain[3])
        assert not torch.equal(out[0], plain[0]) and not torch.equal(out[2], plain[2])


@pytest.mark.parametrize("weight", [0.5, 1.3, -0.4])
def test_what_a_concept_adds_grows_with_the_weight_of_its_word(world, weight):
    i, o, x, W = world["i"], world["o"], world["x"], world["W"]
    for present in ([1, 1, 1], [1, 0, 1]):
        once = edit_of(i, o, world["S"], BIAS, TEMPERATURE, present=[present])
        more = edit_of(i, o, world["S"], BIAS, TEMPERATURE, present=[[weight * p for p in present]])
        rest = once(x)[1]
        assert torch.equal(more(x)[1], rest)
        for a, b in zip(answers(more, x, W), answers(once, x, W), strict=True):
            close(a - rest @ W.T, weight * (b - rest @ W.T), 1e-10)


def test_keys_never_add_an_output(world, three):
    key, value = answers(three, world["x"], torch.zeros(5, 6).double())
    assert torch.equal(key, torch.zeros(4, 7, 5).double())
    close(value, three(world["x"])[2] @ world["o"], 1e-12)


# In place, and out again


def test_inside_the_block_projections_answer_as_edited_and_outside_as_before(world, three):
    key, value = projection(world["W"]), projection(world["W"])
    before, x = {n: t.clone() for n, t in value.state_dict().items()}, world["x"]
    plain = value(x)
    with edited({"to_k": key, "to_v": value}, three):
        assert not torch.equal(key(x), plain) and not torch.equal(value(x), plain)
        assert torch.equal(value.state_dict()["weight"], before["weight"]) and set(value.state_dict()) == set(before)
    assert torch.equal(key(x), plain) and torch.equal(value(x), plain)
    assert "forward" not in vars(key) and "forward" not in vars(value)


def test_an_exception_inside_the_block_leaves_the_projections_as_they_were(world, three):
    key, value = projection(world["W"]), projection(world["W"])
    with pytest.raises(RuntimeError, match="out of memory"):
        with edited({"to_k": key, "to_v": value}, three):
            key(world["x"])
            raise RuntimeError("out of memory")
    assert "forward" not in vars(key) and "forward" not in vars(value)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with edited({"to_k": key, "to_v": value}, three):
            value(world["x"][..., :5])  # fails in the edit itself
    assert "forward" not in vars(key) and "forward" not in vars(value)


def test_a_projection_that_cannot_be_swapped_leaves_those_before_it_as_they_were(world, three):
    key = projection(world["W"])
    with pytest.raises(AttributeError):
        with edited({"to_k": key, "to_v": object()}, three):
            pass
    assert "forward" not in vars(key)


def test_a_forward_that_another_extension_put_there_is_used_and_put_back(world, three):
    key, value, x = projection(world["W"]), projection(world["W"]), world["x"]

    def twice(module):
        plain = module.forward
        return lambda x: 2 * plain(x)

    key.forward, value.forward = twice(key), twice(value)
    theirs = key.forward, value.forward
    try:
        with edited({"to_k": key, "to_v": value}, three):
            keys, rest, g = three(x)
            close(key(x), 2 * keys @ world["W"].T, 1e-12)
            close(value(x), 2 * rest @ world["W"].T + g @ world["o"], 1e-12)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert (key.forward, value.forward) == theirs


def test_blocks_may_lie_inside_each_other(world, three):
    value, x = projection(world["W"]), world["x"]
    with edited({"to_v": value}, three):
        outer = value(x)
        with edited({"to_v": value}, single(three)):
            pass
        assert torch.equal(value(x), outer)
    assert "forward" not in vars(value)


def test_each_input_is_met_with_its_own_edit(world, three):
    """The edit is reused while the same tensor arrives; another tensor, and the first again, get their own."""
    value, x = projection(world["W"]), world["x"]
    first, second = answers(three, x, world["W"])[1], answers(three, x + 1, world["W"])[1]
    with edited({"to_v": value}, three) as of:
        assert of(x) is of(x)
        for _ in range(2):
            assert torch.equal(value(x), first)
            assert torch.equal(value(x + 1), second)


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


def test_the_dial_runs_over_the_published_range_of_biases():
    assert bias_of(0) == 0.60 and bias_of(1) == pytest.approx(0.30)


def test_a_mixture_of_other_concepts_is_refused_like_a_copy_of_one():
    i = torch.randn(3, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    i[2] = 0.4 * i[0] - 0.7 * i[1]
    directions = i / (i * i).sum(1, keepdim=True)
    with pytest.raises(ValueError, match="mixture"):
        overlap(directions, i)
    assert torch.isfinite(joint(overlap(directions[:2], i[:2]))).all()


def test_a_token_that_was_zeroed_out_is_left_alone_whatever_its_mark():
    i = torch.randn(1, 6, dtype=torch.float64)
    edit = Edit(i, i, i / (i @ i.T), torch.zeros(1).double(), torch.ones(1).double(), {}, torch.ones(1, 1).double(),
                torch.ones(2, 1, 1).double())
    x = torch.stack([torch.zeros(3, 6), torch.randn(3, 6)]).double()
    keys, values, g = edit(x)
    assert not keys[0].any() and not values[0].any() and not g[0].any()
    assert g[1].all()


def test_rows_that_the_marks_do_not_fit_get_a_sentence():
    i = torch.ones(1, 4)
    edit = Edit(i, i, i / 4, torch.zeros(1), torch.ones(1), {}, torch.ones(2, 1), torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match="3 rows of text where the prompts have 2"):
        edit(torch.randn(3, 5, 4))
