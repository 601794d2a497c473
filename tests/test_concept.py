"""A concept and its file: what goes in comes out, and whatever else comes gets a sentence.

Files are damaged for real here: cut, overwritten, pickled, too large for the disk.
"""

import hashlib
import json
import os
import pickle
import random
import re
import stat
import struct
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors.torch
import torch

from perfusion.core.concept import FORMAT, LARGEST, Concept, check_word, dump, load, parse, save, write
from perfusion.core.key_lock import bias_of, direction, unit

SD15 = {f"input_blocks.{n}.1.transformer_blocks.0": 320 * 2**k for k, pair in enumerate([(1, 2), (4, 5), (7, 8)])
        for n in pair}
SD15 |= {"middle_block.1.transformer_blocks.0": 1280}
SD15 |= {f"output_blocks.{n}.1.transformer_blocks.0": 1280 // 2**k for k, three in
         enumerate([(3, 4, 5), (6, 7, 8), (9, 10, 11)]) for n in three}
DEPTHS = {"input_blocks.4.1": (640, 2), "input_blocks.5.1": (640, 2), "input_blocks.7.1": (1280, 10),
          "input_blocks.8.1": (1280, 10), "middle_block.1": (1280, 10)}
DEPTHS |= {f"output_blocks.{n}.1": (1280, 10) if n < 3 else (640, 2) for n in range(6)}
SDXL = {f"{name}.transformer_blocks.{n}": width for name, (width, depth) in DEPTHS.items() for n in range(depth)}
SHAPES = {  # base -> value projections, width of text, widths of word embeddings, largest file in bytes
    "sd1": (SD15, 768, {"clip_l": 768}, 40 * 1024),
    "sd2": (SD15, 1024, {"clip_h": 1024}, 40 * 1024),
    "sdxl": (SDXL, 2048, {"clip_l": 768, "clip_g": 1280}, 200 * 1024),
    "creature": ({"input_blocks.1.1.transformer_blocks.0": 24}, 16, {"clip_l": 16}, 4 * 1024),
}


def learnt(base="creature", **changes) -> Concept:
    """A concept with a base's shapes and values like those that learning gives."""
    blocks, d, widths, _ = SHAPES[base]
    r = torch.Generator().manual_seed(0)
    i = torch.randn(d, generator=r)
    spectrum = torch.rand(d, generator=r, dtype=torch.float64) * 30 + 1
    toward, energy = direction(torch.diag(1 / spectrum), i)
    return Concept(**{
        "base": base,
        "superclass": "cat",
        "word": "<mimi>",
        "embedding": {name: 0.02 * torch.randn(width, generator=r) for name, width in widths.items()},
        "target_input": i,
        "key_input": torch.randn(d, generator=r),
        "direction": toward.float(),
        "target_output": {f"{name}.attn2.to_v": torch.randn(width, generator=r) for name, width in blocks.items()},
        "energy": energy,
        "covariance": hashlib.sha256(b"captions").hexdigest(),
        "training": {"steps": 5, "seed": 7, "learning_rate": 0.03, "captions": ["a photo of <mimi>", "猫の写真"]},
    } | changes)


def metadata_of(data: bytes) -> dict:
    return json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]


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


# What goes in comes out


@pytest.mark.parametrize("base", SHAPES)
def test_a_concept_comes_back_from_its_file_as_it_was_but_for_fp16(base, tmp_path):
    concept = learnt(base, strength=0.3, domain="cats", cover="aGVsbG8=", prediction="v")
    path = save(concept, tmp_path / "new folder" / "mimi.safetensors")
    assert path.read_bytes() == dump(concept)
    for back in (load(path), parse(dump(concept), "mimi"), load(path, hashlib.sha256(path.read_bytes()).hexdigest())):
        for field in fields(Concept):
            was, now = getattr(concept, field.name), getattr(back, field.name)
            if isinstance(was, dict) and field.name != "training":
                assert list(sorted(was)) == list(sorted(now))
                pairs = [(was[name], now[name]) for name in was]
            elif torch.is_tensor(was):
                pairs = [(was, now)]
            else:
                assert was == now and type(was) is type(now)
                continue
            for a, b in pairs:
                assert b.dtype == torch.float32
                torch.testing.assert_close(a, b, rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("bias, temperature", [(None, 0.15), (0.4, 0.1), (0.0, 0.2), (-1.5, 0.15)])
def test_the_gate_comes_back_whether_set_by_the_dial_or_raw(bias, temperature):
    concept = parse(dump(learnt(bias=bias, temperature=temperature, strength=0.25)), "mimi")
    assert (concept.bias, concept.temperature, concept.strength) == (bias, temperature, 0.25)
    assert concept.gate_bias == (bias_of(0.25) if bias is None else bias)


def test_strength_zero_is_off_unless_a_raw_bias_is_set():
    assert learnt(strength=0.0).off and parse(dump(learnt(strength=0)), "mimi").off
    assert not learnt(strength=0.0, bias=0.6).off and not learnt(strength=0.01).off


def test_a_change_gives_a_new_concept_and_leaves_the_first_alone():
    concept = learnt()
    assert concept.replace(strength=1.0).strength == 1 and concept.strength == 0.5
    with pytest.raises(AttributeError):
        concept.strength = 1.0


@pytest.mark.parametrize("base", SHAPES)
def test_the_same_concept_gives_the_same_bytes(base):
    data = dump(learnt(base))
    assert all(dump(learnt(base)) == data for _ in range(5))
    assert dump(learnt(base, strength=0.51)) != data


@pytest.mark.parametrize("base", SHAPES)
def test_saving_what_was_loaded_gives_the_same_bytes(base):
    data = dump(learnt(base))
    assert dump(parse(data, "mimi")) == data


@pytest.mark.parametrize("base", SHAPES)
def test_the_similarity_at_the_target_input_is_one_again_after_fp16(base):
    concept = learnt(base)
    stored = (concept.direction.half().double() @ concept.target_input.half().double()).item()
    back = parse(dump(concept), "mimi")
    direction = unit(back.direction[None].double(), back.target_input[None].double())[0]
    assert (direction @ back.target_input.double()).item() == pytest.approx(1, abs=1e-6)
    assert abs(stored - 1) > 1e-6  # it was not, as stored


def test_every_value_of_the_metadata_is_a_string_and_other_programs_find_theirs(tmp_path):
    path = save(learnt(cover="aGVsbG8="), tmp_path / "mimi.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata and all(type(value) is str for value in metadata.values())
    assert metadata["format"] == FORMAT and metadata["word"] == metadata["modelspec.trigger_phrase"] == "<mimi>"
    assert {"base", "prediction", "superclass", "strength", "gate", "energy", "covariance", "domain", "training",
            "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.title"} <= set(metadata)
    assert json.loads(metadata["ssmd_cover_images"]) == ["aGVsbG8="]
    assert "ssmd_cover_images" not in metadata_of(dump(learnt()))


@pytest.mark.parametrize("base", SHAPES)
def test_the_file_is_small_enough_to_travel(base):
    blocks, _, _, largest = SHAPES[base]
    assert (len(blocks), sum(blocks.values())) == {
        "sd1": (16, 12_480), "sd2": (16, 12_480), "sdxl": (70, 83_200), "creature": (1, 24)}[base]
    assert len(dump(learnt(base))) <= largest
    assert all(t.dtype == torch.float16 for t in safetensors.torch.load(dump(learnt(base))).values())


# What is no concept gets a sentence


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


@pytest.mark.parametrize("version", ["perfusion-concept/2", "perfusion-domain/1", ""])
def test_another_format_version_is_refused_by_name(version):
    refused(remade(metadata={"format": version}), f"should be {FORMAT}, it is {version}")


@pytest.mark.parametrize("name", ["target_input", "key_input", "direction"])
def test_a_missing_tensor_is_named(name):
    refused(remade(without=[name]), "lacks", f"'{name}'")


@pytest.mark.parametrize("name", ["lora_up", "embedding.t5", "target_output.", "__class__"])
def test_an_unknown_tensor_is_named(name):
    refused(remade({name: torch.ones(3)}), "holds unknown", f"'{name}'")


OUTPUT = "target_output.input_blocks.1.1.transformer_blocks.0.attn2.to_v"
NAMES = ["embedding.clip_l", "target_input", "key_input", "direction", OUTPUT]


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
    with pytest.raises(ValueError, match=f"another 'mimi.safetensors'.*{wanted[:12]}.*{came[:12]}.*choose this one"):
        load(path, wanted)


# Saving


@pytest.mark.parametrize("value", [65520.0, -1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_learning_that_diverged_is_refused_by_name_and_the_old_file_stays(tmp_path, name, value):
    path = save(learnt(), tmp_path / "mimi.safetensors")
    concept, old = learnt(), path.read_bytes()
    field, _, key = name.partition(".")
    vector = getattr(concept, field)[key] if key else getattr(concept, field)
    vector[2] = value
    with pytest.raises(ValueError, match=f"^'{re.escape(name)}' of <mimi>.*learning diverged.*tune the concept again"):
        save(concept, path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


def test_the_largest_number_of_fp16_is_kept():
    concept = learnt(target_output={"to_v": torch.tensor([65504.0, -65504.0, 65519.0])})
    assert parse(dump(concept), "mimi").target_output["to_v"].tolist() == [65504, -65504, 65504]


def test_saving_over_a_concept_replaces_it_whole(tmp_path):
    path = save(learnt("sd1"), tmp_path / "mimi.safetensors")
    assert save(learnt(), path) == path
    assert load(path).base == "creature" and os.listdir(tmp_path) == [path.name]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


CHILD = """
import hashlib, json, resource, signal, sys, types
pack = sys.modules["perfusion"] = types.ModuleType("perfusion")
pack.__path__ = [sys.argv[1]]
from perfusion.core.concept import dump, load, save

concept = load(sys.argv[2])
said = {"hash": hashlib.sha256(dump(concept)).hexdigest()}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
try:
    save(concept, sys.argv[3])
except OSError as error:
    said["sentence"] = error.strerror
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """A process of its own that may write 16 KB a file: it loads larger.safetensors and saves it over mimi.safetensors.

    Gives what it said, and the folder.
    """
    pytest.importorskip("resource", reason="limits on a file's size are POSIX")
    folder = tmp_path_factory.mktemp("concepts")
    larger, path = save(learnt("sd1"), folder / "larger.safetensors"), save(learnt(), folder / "mimi.safetensors")
    line = [sys.executable, "-c", CHILD, Path(__file__).parent.parent, larger, path]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


def test_a_concept_saved_again_gives_the_same_bytes_here_and_in_another_process(child):
    data = dump(learnt("sd1"))
    assert dump(parse(data, "mimi")) == data
    assert child[0]["hash"] == hashlib.sha256(data).hexdigest()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(child):
    said, folder = child
    assert re.match(r"'mimi.safetensors' \(3\d KB\) could not be written to .*: File too large\. Nothing was "
                    r"changed there\. Make room or choose another folder", said["sentence"])
    assert (folder / "mimi.safetensors").read_bytes() == dump(learnt())
    assert sorted(os.listdir(folder)) == ["larger.safetensors", "mimi.safetensors"]


def test_a_folder_that_cannot_be_written_gets_a_sentence(tmp_path):
    file = write(tmp_path / "a file", b"mine")
    for path in (file / "mimi.safetensors", file / "deeper" / "mimi.safetensors"):
        with pytest.raises(OSError, match=r"'mimi.safetensors' \(\d+ KB\) could not be written to .*another folder"):
            save(learnt(), path)
    assert file.read_bytes() == b"mine" and os.listdir(tmp_path) == ["a file"]


def test_a_folder_in_the_files_place_gets_a_sentence_and_no_file_beside_it(tmp_path):
    (tmp_path / "mimi.safetensors" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="'mimi.safetensors' .* could not be written to"):
        save(learnt(), tmp_path / "mimi.safetensors")
    assert os.listdir(tmp_path) == ["mimi.safetensors"]


# The word


@pytest.mark.parametrize("word", ["<mimi>", "<my-cat_2>", "<ミミ>", "<2>"])
def test_a_word_in_angle_brackets_is_taken(word):
    assert check_word(word) == word
    assert parse(dump(learnt(word=word)), "mimi").word == word


@pytest.mark.parametrize("word, proposed", [("cat", "<cat>"), ("", "<mimi>"), ("<a b>", "<ab>"), ("<>", "<mimi>"),
                                            ("(<x>)", "<x>"), ("<x> ", "<x>"), ("<x>\n", "<x>"), ("<x:1.2>", "<x12>")])
def test_any_other_word_is_refused_and_one_that_works_is_proposed(word, proposed):
    with pytest.raises(ValueError, match="angle brackets") as caught:
        check_word(word)
    assert f"try '{proposed}'" in str(caught.value)
    assert check_word(proposed) == proposed
