"""A concept's file: whatever is no concept gets a sentence.

Files are damaged for real here: cut, overwritten, pickled, too large.
"""

import hashlib
import json
import pickle
import random
import re
import struct
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from perfusion.core.concept import FORMAT, LARGEST, dump, load, parse, save, write
from perfusion.core.int8 import SCALES

from concepts import NAMES, OUTPUT, learnt, metadata_of


def remade(tensors=None, without=(), metadata=None, lacking=(), concept=None) -> bytes:
    """The bytes of a concept with some tensors or metadata put in, or left out."""
    data = dump(concept or learnt())
    facts = {k: v for k, v in (metadata_of(data) | (metadata or {})).items() if k not in lacking}
    kept = {k: v for k, v in (safetensors.torch.load(data) | (tensors or {})).items() if k not in without}
    return safetensors.torch.save(kept, facts)


def refused(data: bytes, *words: str):
    """A sentence names the file, says what is wrong in these words and what to do; and it is no bare error."""
    with pytest.raises(ValueError) as caught:
        parse(data, "mimi.safetensors")
    said = str(caught.value)
    assert "'mimi.safetensors'" in said
    assert re.search(r"(Load another file, or tune the concept again|`python -m headless convert` first)\.$", said)
    for word in words:
        assert word in said, said


def test_a_file_cut_anywhere_is_refused():
    data = dump(learnt("sd1"))
    header = 8 + struct.unpack("<Q", data[:8])[0]
    edges = [*range(12), header - 1, header, header + 1, len(data) - 2, len(data) - 1]
    for end in edges + list(range(12, len(data), len(data) // 60)):
        refused(data[:end], "not a whole .safetensors file")


def test_bytes_after_the_end_are_refused():
    refused(dump(learnt()) + b"\0", "not a whole .safetensors file")


def test_a_file_with_any_byte_changed_is_a_concept_or_gets_a_sentence():
    r, data = random.Random(0), dump(learnt())
    refusals = 0
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(r.choice([1, 1, 3, 20])):
            damaged[r.randrange(len(data) if r.random() < 0.3 else 1200)] = r.randrange(256)
        try:
            parse(bytes(damaged), "mimi.safetensors")
        except ValueError as error:
            assert "'mimi.safetensors'" in str(error)
            refusals += 1
    assert 100 < refusals < 1400  # both happened


def test_random_bytes_are_refused():
    r = random.Random(1)
    for size in (1, 7, 8, 9, 100, 10_000):
        refused(r.randbytes(size), "not a whole .safetensors file")
        refused(struct.pack("<Q", min(size, 90)) + r.randbytes(size), "not a whole .safetensors file")


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_huge_is_refused_and_takes_no_memory(length):
    refused(struct.pack("<Q", length) + dump(learnt())[8:], "not a whole .safetensors file")


@pytest.mark.parametrize("kind, size", [("F8_E8M0", 16), ("F6_E2M3", 12), ("F4", 8), ("F128", 256), (3, 16)])
def test_numbers_of_a_kind_that_torch_lacks_are_refused(kind, size):
    header = json.dumps({"__metadata__": metadata_of(dump(learnt())),
                         "target_input": {"dtype": kind, "shape": [16], "data_offsets": [0, size]}}).encode()
    refused(struct.pack("<Q", len(header)) + header + bytes(size), "not a whole .safetensors file")


class Bait:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_by_another_name_is_refused_and_never_unpickled(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "mimi.safetensors"
    pickle.loads(pickle.dumps(Bait(mark)))
    assert mark.exists()
    mark.unlink()
    path.write_bytes(pickle.dumps(Bait(mark)))
    refused(path.read_bytes(), "not a whole .safetensors file")
    torch.save({"target_input": Bait(mark)}, path)
    with pytest.raises(ValueError, match="'mimi.safetensors' is not a whole .safetensors file"):
        load(path)
    assert not mark.exists()


@pytest.mark.parametrize("metadata", [None, {}, {"ss_network_module": "networks.lora", "ss_network_dim": "4"}])
def test_a_lora_is_refused_as_no_concept(metadata):
    lora = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 320)}
    refused(safetensors.torch.save(lora, metadata), f"should be {FORMAT}", "it is not given")


@pytest.mark.parametrize("version", ["perfusion-concept/3", "perfusion-domain/1", ""])
def test_another_format_version_is_refused_by_name(version):
    refused(remade(metadata={"format": version}), f"should be {FORMAT} or perfusion-concept/2, it is {version}")


def test_int8_without_its_format_is_no_concept():
    refused(remade({OUTPUT: torch.ones(24, dtype=torch.int8)}), f"'{OUTPUT}'", "is int8, fp16 was expected")


@pytest.mark.parametrize("change, words", [
    (dict(without=[SCALES]), ["has value outputs in int8 and lacks", SCALES]),
    (dict(tensors={SCALES: torch.ones(2)}), [SCALES, "shape (2,), one scale for each of 1 value outputs"]),
    (dict(tensors={SCALES: torch.ones(1, 1)}), [SCALES, "shape (1, 1)"]),
    (dict(tensors={SCALES: torch.zeros(1)}), [SCALES, "no scales"]),
    (dict(tensors={SCALES: torch.tensor([float("nan")])}), [SCALES, "no scales"]),
    (dict(tensors={OUTPUT: torch.ones(24).half()}), [f"'{OUTPUT}'", "is float16, int8 was expected"]),
    (dict(tensors={OUTPUT: torch.ones(2, 12, dtype=torch.int8)}), [f"'{OUTPUT}'", "shape (2, 12), a vector"]),
    (dict(tensors={"direction": torch.ones(16, dtype=torch.int8)}), ["'direction'", "is int8, fp16 was expected"]),
    (dict(without=[OUTPUT]), [SCALES, "of 0 value outputs"]),
    (dict(tensors={"lora": torch.ones(3)}), ["holds unknown", "'lora'"]),
    (dict(without=["key_input"]), ["lacks", "'key_input'"]),
    (dict(metadata={"format": FORMAT}), ["holds unknown", SCALES]),
])
def test_a_damaged_int8_file_gets_a_sentence(change, words):
    refused(remade(concept=learnt(precision="int8"), **change), *words)


@pytest.mark.parametrize("name", ["target_input", "key_input", "direction"])
def test_a_missing_tensor_is_named(name):
    refused(remade(without=[name]), "lacks", f"'{name}'")


@pytest.mark.parametrize("name", ["lora_up", "embedding.t5", "target_output.", "__class__"])
def test_an_unknown_tensor_is_named(name):
    refused(remade({name: torch.ones(3)}), "holds unknown", f"'{name}'")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 16), (77, 24), ()])
def test_a_tensor_that_is_no_vector_is_named_with_its_shape(name, shape):
    refused(remade({name: torch.ones(shape)}), f"'{name}'", f"shape {shape}", "a vector was expected")


@pytest.mark.parametrize("name", ["target_input", "key_input", "direction"])
@pytest.mark.parametrize("size", [0, 1, 15, 17])
def test_vectors_of_text_that_do_not_fit_together_are_refused(name, size):
    refused(remade({name: torch.ones(size)}), "Target input, key input and direction", "one width", str(size))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_with_a_value_that_is_no_number_is_named(name, value):
    tensor = safetensors.torch.load(dump(learnt()))[name]
    tensor[-1] = value
    refused(remade({name: tensor}), f"'{name}'", "not numbers (NaN or infinite)")


@pytest.mark.parametrize("toward", [torch.zeros(16), -torch.ones(16) * 1e-4])
def test_a_direction_of_something_else_is_refused(toward):
    refused(remade({"direction": toward}), "direction", "does not belong to its target input")


DAMAGE = [
    ({"strength": "abc"}, "abc"),
    ({"strength": "nan"}, "range"),
    ({"strength": "inf"}, "range"),
    ({"strength": ""}, "float"),
    ({"energy": "1e999"}, "range"),
    ({"base": "flux"}, "range"),
    ({"base": ""}, "range"),
    ({"word": "mimi"}, "angle brackets"),
    ({"word": "<a b>"}, "angle brackets"),
    ({"gate": '{"bias": null, "temperature": 0}'}, "range"),
    ({"gate": '{"bias": null, "temperature": -0.1}'}, "range"),
    ({"gate": '{"bias": null, "temperature": NaN}'}, "range"),
    ({"gate": '{"bias": null, "temperature": null}'}, "NoneType"),
    ({"gate": '{"bias": Infinity, "temperature": 0.15}'}, "range"),
    ({"gate": '{"bias": "high", "temperature": 0.15}'}, "high"),
    ({"gate": '{"bias": 0.5}'}, "temperature"),
    ({"gate": "null"}, "NoneType"),
    ({"gate": "[]"}, "list"),
    ({"gate": "{"}, "Expecting"),
    ({"gate": "[" * 100_000}, "recursion"),
    ({"training": "steps 5"}, "Expecting"),
    ({"training": "5"}, "int"),
    ({"ssmd_cover_images": "7"}, "int"),
    ({"ssmd_cover_images": "[7]"}, "int"),
    ({"ssmd_cover_images": "{}"}, ""),
]


@pytest.mark.parametrize("change, word", DAMAGE, ids=[str(change)[:60] for change, _ in DAMAGE])
def test_damaged_facts_are_refused(change, word):
    refused(remade(metadata=change), "The facts stored in", "damaged", word)


@pytest.mark.parametrize("name", ["base", "prediction", "superclass", "word", "strength", "energy", "covariance",
                                  "domain", "gate", "training"])
def test_a_missing_fact_is_named(name):
    refused(remade(lacking=[name]), "damaged", f"'{name}'")


def test_a_file_larger_than_any_concept_is_refused_unread(tmp_path):
    path = tmp_path / "mimi.safetensors"
    with path.open("wb") as file:
        file.truncate(LARGEST + 2**36)  # sparse; read, it would not fit in memory
    with pytest.raises(ValueError, match="'mimi.safetensors' has 65552 MB; a concept has less than one"):
        load(path)


def test_an_empty_file_is_refused(tmp_path):
    path = write(tmp_path / "mimi.safetensors", b"")
    with pytest.raises(ValueError, match="'mimi.safetensors' is not a whole .safetensors file"):
        load(path)


def test_another_file_than_the_workflows_is_refused_by_both_hashes(tmp_path):
    path = save(learnt(), tmp_path / "mimi.safetensors")
    came = hashlib.sha256(path.read_bytes()).hexdigest()
    wanted = hashlib.sha256(b"another").hexdigest()
    with pytest.raises(ValueError, match=f"another 'mimi.safetensors'.*{wanted[:12]}.*{came[:12]}.*Use this file"):
        load(path, wanted)


# Found by tests/faults: before, each got another error than a sentence, or one far too long


@pytest.mark.parametrize("size", [2**20 * 2 + 1, 15_000_000])
def test_a_header_larger_than_any_is_refused_before_it_is_read(size):
    many = {f"t{k}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for k in range(size // 60)}
    header = json.dumps(many).encode().ljust(size)
    begun = time.process_time()
    refused(struct.pack("<Q", len(header)) + header, "not a whole .safetensors file", "a header of")
    assert time.process_time() - begun < 0.1


@pytest.mark.parametrize("shape", [[0, 2**63], [0] * 70, [1] * 70])
def test_shapes_that_torch_cannot_make_or_compute_with_are_refused(shape):
    count = 0 if 0 in shape else 1
    header = json.dumps({"__metadata__": metadata_of(dump(learnt())), "target_input": {
        "dtype": "F16", "shape": shape, "data_offsets": [0, 2 * count]}}).encode()
    refused(struct.pack("<Q", len(header)) + header + bytes(2 * count), "not a whole .safetensors file")


@pytest.mark.parametrize("change, word", [
    ({"gate": '{"bias": 1' + "0" * 400 + ', "temperature": 0.1}'}, "too large"),
    ({"training": '[[1, 2], ["steps", 3]]'}, "list"),
    ({"training": '["ab"]'}, "list"),
    ({"prediction": "x"}, "range"),
], ids=["number", "pairs", "letters", "prediction"])
def test_facts_that_could_not_be_written_again_are_refused(change, word):
    refused(remade(metadata=change), "The facts stored in", "damaged", word)


@pytest.mark.parametrize("name", ["embedding.clip_l", OUTPUT])
def test_a_tensor_without_a_number_is_named(name):
    refused(remade({name: torch.ones(0)}), f"'{name}'", "holds no number at all")


@pytest.mark.parametrize("change", [
    dict(metadata={"format": "x" * 9000}), dict(metadata={"word": "x" * 9000}), dict(metadata={"energy": "x" * 9000}),
    dict(tensors={"x" * 9000: torch.ones(3)}), dict(tensors={f"lora_{k}": torch.ones(1) for k in range(3000)}),
])
def test_a_sentence_stays_short_whatever_the_file_says(change):
    with pytest.raises(ValueError) as caught:
        parse(remade(**change), "mimi.safetensors")
    assert len(str(caught.value)) < 600
