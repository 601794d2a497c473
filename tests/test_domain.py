"""Domain and its file: what goes in comes out, and what is no domain gets a sentence."""

import json
from dataclasses import replace

import pytest
import torch

from perfusion.core import domain as domains
from perfusion.core.domain import Domain, dump, load, parse, save
from perfusion.core.encoder import Encoder
from perfusion.core.file import pack, unpacked
from perfusion.core.members import Members
from perfusion.core.weight_offset import Offset

NAMES = "input_blocks.1.1.transformer_blocks.0.attn1.to_q", "middle_block.1.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def domain():
    torch.manual_seed(0)
    encoder = Encoder(3, 10, {"clip_l": 5, "clip_g": 7}, {NAMES[1]: 4}, hidden=16)
    for layer in (*encoder.out.values(), *encoder.values.values()):
        torch.nn.init.normal_(layer.weight)
    encoder.load_state_dict({name: t.half().float() for name, t in encoder.state_dict().items()})
    offsets = {name: Offset(torch.randn(3, 4).half().float(), torch.randn(2, 6).half().float()) for name in NAMES}
    members = Members(torch.randn(10).half().float(), torch.randn(10, 10).half().float(), torch.tensor(1.5))
    return Domain("sd1", "eps", "cat", "0123", encoder.eval(), offsets, {"steps": 3, "rate": 1e-3}, members)


def changed(domain, tensors=(), **metadata):
    """The file with some tensors and facts put in place of its own; None takes one away."""
    held, facts = unpacked(dump(domain), "x", "")
    held, facts = held | dict(tensors), facts | metadata
    return pack({k: t for k, t in held.items() if t is not None}, {k: v for k, v in facts.items() if v is not None})


def test_a_domain_comes_back_from_its_file_and_answers_alike(domain, tmp_path):
    path = save(domain, tmp_path / "folder" / "cats.safetensors")
    found = load(path)
    assert dump(found) == dump(domain) == path.read_bytes() and found.hash == domain.hash
    assert (found.base, found.prediction, found.superclass, found.tower, found.training) == (
        "sd1", "eps", "cat", "0123", {"steps": 3, "rate": 1e-3})
    seen = torch.randn(2, 3, 10)
    for here, there in zip(domain.encoder(seen), found.encoder(seen)):
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    assert all(torch.equal(here, there) for here, there in zip(domain.members, found.members))
    assert load(save(replace(domain, members=None), path)).members is None
    assert found.offsets.keys() == set(NAMES)
    assert all(torch.equal(a, b) for name in NAMES for a, b in zip(found.offsets[name], domain.offsets[name]))
    assert not any(p.requires_grad for p in found.encoder.parameters())


def test_the_hash_is_computed_once_and_tells_one_number_from_another(domain):
    assert domain.hash is domain.hash
    other = domain.offsets | {NAMES[0]: Offset(domain.offsets[NAMES[0]].output + 1, domain.offsets[NAMES[0]].input)}
    assert replace(domain, offsets=other).hash != domain.hash
    assert replace(domain).hash == domain.hash


def test_what_fp16_cannot_hold_is_not_saved(domain, tmp_path):
    domain.encoder.tower[1].weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="tower.1.weight.*diverged"):
        save(domain, tmp_path / "cats.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how, says", [
    (dict(tensors={"encoder.tower.0.weight": None}), "encoder in 'x' is damaged"),
    (dict(tensors={"encoder.tower.1.weight": torch.zeros(16, 11)}), "encoder in 'x' is damaged"),
    (dict(tensors={"encoder.tower.2.bias": None}), "encoder in 'x' is damaged"),
    (dict(tensors={"encoder.tower.0.weight": torch.zeros(3)}), "encoder in 'x' is damaged"),
    (dict(tensors={"encoder.out.clip_l.weight": None, "encoder.out.clip_g.weight": None}), "encoder in 'x' is damaged"),
    (dict(tensors={"members.limit": None}), "says of its pictures is damaged"),
    (dict(tensors={"members.factor": torch.zeros(10, 9)}), "says of its pictures is damaged"),
    (dict(tensors={"members.factor": torch.zeros(())}), "says of its pictures is damaged"),
    (dict(tensors={"encoder.out.clip_l.bias": torch.full((5,), torch.nan)}), "no numbers"),
    (dict(tensors={"encoder.tower.0.bias": torch.zeros(16, dtype=torch.int32)}), "no numbers"),
    (dict(tensors={f"encoder.values.{NAMES[1]}.bias": None}), "encoder in 'x' is damaged"),
    (dict(tensors={f"encoder.values.{NAMES[1]}.weight": torch.zeros(4, 9)}), "encoder in 'x' is damaged"),
    (dict(tensors={"other": torch.zeros(1)}), "unknown"),
    (dict(tensors={f"offset.{NAMES[0]}.input": None}), "factors"),
    (dict(tensors={f"offset.{NAMES[0]}.input": torch.zeros(3, 6)}), "factors"),
    (dict(base="sd9"), "facts"), (dict(base=None), "facts"), (dict(training="[1"), "facts"),
    (dict(training=json.dumps([1])), "facts"), (dict(superclass=""), "facts"), (dict(prediction="x"), "facts"),
    (dict(format="perfusion-concept/1"), "not a domain"), (dict(format=None), "not a domain"),
])
def test_a_damaged_file_gets_a_sentence(domain, how, says):
    with pytest.raises(ValueError, match=says) as caught:
        parse(changed(domain, **how), "x")
    assert str(caught.value).endswith(".")


def test_a_file_cut_short_anywhere_gets_a_sentence(domain):
    data = dump(domain)
    for end in range(0, len(data), 97):
        with pytest.raises(ValueError, match="not a whole .safetensors file"):
            parse(data[:end], "x")


def test_a_file_too_large_is_not_read(domain, tmp_path, monkeypatch):
    monkeypatch.setattr(domains, "LARGEST", 100)
    with pytest.raises(ValueError, match="another kind of file"):
        load(save(domain, tmp_path / "cats.safetensors"))


@pytest.mark.parametrize("training", ['[["a", 1]]', "[]", "7"])
def test_facts_of_training_that_are_no_facts_by_name_are_refused(domain, training):
    with pytest.raises(ValueError, match="damaged .*facts by name were expected"):
        parse(changed(domain, training=training), "x")


def test_numbers_of_eight_bits_are_read_or_refused_with_a_sentence(domain):
    whole = {"members.limit": torch.tensor(1.5).to(torch.float8_e4m3fn)}
    assert parse(changed(domain, whole), "x").members.limit == 1.5
    nan = {"members.limit": torch.tensor(float("nan")).to(torch.float8_e5m2)}
    with pytest.raises(ValueError, match="no numbers in .'members.limit'"):
        parse(changed(domain, nan), "x")
