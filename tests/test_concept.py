"""A concept and its file: what goes in comes out, a file is replaced whole or not at all, and which words are taken."""

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors.torch
import torch

from perfusion.core.concept import FORMAT, Concept, check_word, dump, load, parse, save, write
from perfusion.core.key_lock import unit

from concepts import NAMES, SHAPES, learnt, metadata_of

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
    assert (concept.gate_bias, concept.scale) == ((0.30, 0.25) if bias is None else (bias, 1.0))


def test_strength_zero_is_off_unless_a_raw_bias_is_set():
    assert learnt(strength=0.0).off and parse(dump(learnt(strength=0)), "mimi").off
    assert not learnt(strength=0.0, bias=0.6).off and not learnt(strength=0.01).off


def test_a_change_gives_a_new_concept_and_leaves_the_first_alone():
    concept = learnt()
    assert concept.replace(strength=1.0).strength == 1 and concept.strength == 0.75
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
