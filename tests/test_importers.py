"""Files of other Perfusion programs: one concept comes out the same by every road, and nothing of the file's runs.

The files are built here, in the published shapes, with random tensors.
"""

import hashlib
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from perfusion.core import importers
from perfusion.core.concept import dump, parse

ROOT = Path(__file__).parent.parent
DOWN = {"input_blocks.1.1": 320, "input_blocks.2.1": 320, "input_blocks.4.1": 640, "input_blocks.5.1": 640,
        "input_blocks.7.1": 1280, "input_blocks.8.1": 1280}
MIDDLE = {"middle_block.1": 1280}
UP = {"output_blocks.3.1": 1280, "output_blocks.4.1": 1280, "output_blocks.5.1": 1280, "output_blocks.6.1": 640,
      "output_blocks.7.1": 640, "output_blocks.8.1": 640, "output_blocks.9.1": 320, "output_blocks.10.1": 320,
      "output_blocks.11.1": 320}
LDM, DIFFUSERS = DOWN | MIDDLE | UP, DOWN | UP | MIDDLE  # the same layers, in their order of registration
ATTN = "transformer_blocks.0.attn2"


class Content:
    """One random concept: what every format stores of it."""

    def __init__(self, d=768, seed=0):
        def randn(*shape):
            return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)))

        root = randn(d, d) / d**0.5
        self.inverse = root @ root.T + torch.eye(d) + 1e-4 * randn(d, d)  # inverted in fp32: not quite symmetric
        self.target_input, self.embedding = randn(d), randn(d).flip(0)
        flat = randn(2 * 12480)
        k, v = flat.split(12480)
        self.keys = dict(zip(LDM, k.split(list(LDM.values())), strict=True))
        self.values = dict(zip(LDM, v.split(list(LDM.values())), strict=True))


@pytest.fixture(scope="module")
def content():
    return Content()


def ldm(content, words=("teddy",), rows=lambda o: o.expand(77, -1)):
    """A `*.ckpt` of ChenDarYen's program; `rows` makes the table (77, d_out) of an output (d_out)."""
    outputs = {f"{b}.{ATTN}.to_k.target_output": rows(o) for b, o in content.keys.items()}
    outputs |= {f"{b}.{ATTN}.to_v.target_output": rows(o) for b, o in content.values.items()}
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(content.embedding[None])})
    return {
        "global_step": 400, "C_inv": content.inverse, "target_input": content.target_input, "target_output": outputs,
        "embedding": {"initializer_words": words, "string_to_token": {"*": 265}, "string_to_param": parameters},
    }


def parts(*contents, order=LDM):
    """A `*.pt` of perfusion-pytorch, of one concept or several, with the modules registered in this order."""
    pairs = []
    for block in order:
        for outputs in ("keys", "values"):
            pairs.append([torch.stack([c.target_input for c in contents]),
                          torch.stack([getattr(c, outputs)[block] for c in contents])])
    embeddings = torch.stack([c.embedding for c in contents])
    return {"embed_params": embeddings, "key_value_params": pairs, "C_inv": contents[0].inverse}


def write(path, state):
    torch.save(state, path)
    return path


def refused(path, *words, **settings):
    """The sentence with which the file is refused: it holds these words."""
    with pytest.raises(ValueError) as caught:
        importers.convert(path, "<teddy>", **settings)
    message = str(caught.value)
    assert all(word in message for word in words) and message.endswith(".") and "\n" not in message, message
    return message


def test_every_road_gives_the_same_concept(content, tmp_path):
    roads = [
        importers.convert(write(tmp_path / "a.ckpt", ldm(content)), "<teddy>")[0],
        importers.convert(write(tmp_path / "b.pt", parts(content)), "<teddy>", "teddy")[0],
        importers.convert(write(tmp_path / "c.pt", parts(content, order=DIFFUSERS)), "<teddy>", "teddy")[0],
    ]
    for concept in roads:
        assert concept.target_output.keys() == {f"{b}.{ATTN}.to_v" for b in LDM}
        for block, value in content.values.items():
            assert torch.equal(concept.target_output[f"{block}.{ATTN}.to_v"], value)
        assert torch.equal(concept.embedding["clip_l"], content.embedding)
        assert concept.covariance == roads[0].covariance and concept.superclass == "teddy"
        torch.testing.assert_close(concept.direction, roads[0].direction)
        torch.testing.assert_close(concept.target_input, content.target_input)


def test_the_value_outputs_have_the_widths_of_sd1(content):
    concept, _ = importers.from_ldm(ldm(content), "<teddy>")
    assert {n: len(o) for n, o in concept.target_output.items()} == {f"{b}.{ATTN}.to_v": w for b, w in LDM.items()}
    assert sum(map(len, concept.target_output.values())) == 12480


def test_rows_collapse_to_their_mean_weighted_by_the_training_templates(content):
    def numbered(o):
        return torch.arange(77.0)[:, None].expand(77, len(o))  # row n holds n

    concept, notes = importers.from_ldm(ldm(content, rows=numbered), "<teddy>")
    # 4 templates put the concept at token 4; 2 each at 5 and 6; 1 at 2
    for output in concept.target_output.values():
        torch.testing.assert_close(output, torch.full_like(output, (4 * 4 + 2 * 5 + 2 * 6 + 1 * 2) / 9))
    assert any("77 rows" in note for note in notes)


def test_direction_and_energy_are_those_of_the_symmetrised_inverse(content):
    concept, _ = importers.from_ldm(ldm(content), "<teddy>")
    i, symmetric = content.target_input.double(), (content.inverse.double() + content.inverse.double().T) / 2
    energy = i @ symmetric @ i
    assert concept.energy == pytest.approx(energy.item(), rel=1e-12)
    torch.testing.assert_close(concept.direction.double(), symmetric @ i / energy, rtol=1e-6, atol=1e-9)
    assert concept.direction @ concept.target_input == pytest.approx(1, abs=1e-4)
    digest = hashlib.sha256(struct.pack(f"<{768 * 768}f", *content.inverse.flatten().tolist())).hexdigest()
    assert concept.covariance == f"imported-{digest[:16]}"


@pytest.mark.parametrize("road", ["ldm", "parts"])
def test_the_file_survives_its_own_format(content, road):
    concept, notes = (importers.from_ldm(ldm(content), "<teddy>") if road == "ldm" else
                      importers.from_parts(parts(content), "<teddy>", "teddy"))
    data = dump(concept)
    again = parse(data, "again")
    assert len(data) < 40 * 1024
    assert again.training == concept.training and again.covariance == concept.covariance
    assert again.target_output.keys() == concept.target_output.keys()
    for name in ("target_input", "key_input", "direction"):
        torch.testing.assert_close(getattr(again, name), getattr(concept, name), rtol=2e-3, atol=1e-6)
    assert torch.equal(concept.key_input, concept.target_input) and any("Keys: locked to" in note for note in notes)
    assert any("Gate: not stored" in note for note in notes) and any(concept.covariance in note for note in notes)


def test_the_base_is_told_from_the_width(content):
    concept, notes = importers.from_parts(parts(Content(d=1024)), "<teddy>", "teddy")
    assert concept.base == "sd2" and list(concept.embedding) == ["clip_h"] and "SD2.x" in notes[0]
    assert importers.from_parts(parts(content), "<teddy>", "teddy")[0].base == "sd1"


def test_several_concepts_are_taken_by_index(content):
    other = Content(seed=7)
    for index, wanted in enumerate((content, other)):
        concept, notes = importers.from_parts(parts(content, other), "<teddy>", "teddy", index)
        torch.testing.assert_close(concept.target_input, wanted.target_input)
        assert torch.equal(concept.embedding["clip_l"], wanted.embedding)
        assert torch.equal(concept.target_output[f"middle_block.1.{ATTN}.to_v"], wanted.values["middle_block.1"])
        assert f"Concept {index} of 0 to 1 was taken." in notes


def test_an_index_that_the_file_lacks_is_refused(content, tmp_path):
    refused(write(tmp_path / "two.pt", parts(content, Content(seed=7))), "0 to 1", "number 2", superclass="a", index=2)
    refused(write(tmp_path / "one.ckpt", ldm(content)), "one concept", index=1)


def test_target_inputs_that_disagree_are_refused(content, tmp_path):
    state = parts(content)
    state["key_value_params"][5][0] = state["key_value_params"][5][0] * 1.01
    refused(write(tmp_path / "a.pt", state), "32 copies", "one vector", superclass="teddy")
    state["key_value_params"][5][0] = state["key_value_params"][4][0] * (1 + 1e-5)  # noise
    importers.from_parts(state, "<teddy>", "teddy")


def test_widths_that_nobody_has_are_refused(content, tmp_path):
    state = parts(content)
    state["key_value_params"] = state["key_value_params"][::-1][2:]
    refused(write(tmp_path / "order.pt", state), "30 projections", superclass="teddy")
    state = ldm(content)
    state["target_input"] = torch.ones(2048)
    refused(write(tmp_path / "sdxl.ckpt", state), "2048", "768")
    state = ldm(content)
    state["target_output"].popitem()
    refused(write(tmp_path / "short.ckpt", state), "output_blocks.11.1", "missing")
    state["target_output"] = {name: o[:75] for name, o in ldm(content)["target_output"].items()}
    refused(write(tmp_path / "rows.ckpt", state), "(77, 320)", "(75, 320)")


def test_a_superclass_is_asked_for_where_the_file_has_none(content, tmp_path):
    refused(write(tmp_path / "a.pt", parts(content)), "--superclass")
    refused(write(tmp_path / "b.ckpt", ldm(content, words=None)), "--superclass")
    assert importers.from_ldm(ldm(content), "<teddy>", "bear")[0].superclass == "bear"


def test_a_word_that_the_encoder_may_know_is_refused(content):
    with pytest.raises(ValueError, match="angle brackets"):
        importers.from_ldm(ldm(content), "teddy")


def test_numbers_that_a_concept_cannot_hold_are_refused(content, tmp_path):
    state = ldm(content, rows=lambda o: o.expand(77, -1) * float("nan"))
    refused(write(tmp_path / "nan.ckpt", state), "NaN")
    state = ldm(content) | {"target_input": torch.zeros(768)}
    refused(write(tmp_path / "zero.ckpt", state), "energy")
    state = ldm(content) | {"C_inv": -content.inverse}
    refused(write(tmp_path / "negative.ckpt", state), "energy")


def foreign(monkeypatch, name, **fields):
    """An instance of a class whose package is not installed; pickle finds it until the monkeypatch is undone."""
    module, _, own = name.rpartition(".")
    for each in (module.partition(".")[0], module):
        monkeypatch.setitem(sys.modules, each, types.ModuleType(each))
    made = type(own, (), {"__module__": module})()
    setattr(sys.modules[module], own, type(made))
    vars(made).update(fields)
    return made


def test_the_superclass_is_found_in_a_list_of_omegaconf_that_is_not_installed(content, tmp_path, monkeypatch):
    # As omegaconf 2.1.1 stores it: nodes below, the whole configuration above, types and a defaultdict beside.
    node = foreign(monkeypatch, "omegaconf.nodes.AnyNode", _val="teddy")
    about = foreign(monkeypatch, "omegaconf.base.ContainerMetadata", ref_type=Any, object_type=list, key_type=int,
                    resolver_cache=defaultdict(dict))
    config = foreign(monkeypatch, "omegaconf.dictconfig.DictConfig", _content={}, _metadata=about)
    words = foreign(monkeypatch, "omegaconf.listconfig.ListConfig", _content=[node], _parent=config, _metadata=about)
    config._content["initializer_words"] = words  # a cycle, as there
    path = write(tmp_path / "a.ckpt", ldm(content, words=words))
    monkeypatch.undo()
    concept, notes = importers.convert(path, "<teddy>")
    assert concept.superclass == "teddy" and any("read from the file" in note for note in notes)


class Touch:
    """Unpickled freely, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(content, tmp_path):
    touched = tmp_path / "touched"
    path = write(tmp_path / "evil.ckpt", ldm(content) | {"extra": Touch(touched)})
    refused(path, "posix.system" if os.name == "posix" else "nt.system", "Nothing was run")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Touch(touched)))
    refused(tmp_path / "bare.pt", "not a whole archive")
    assert not touched.exists()
    torch.load(path, weights_only=False)  # the trap was a real one
    assert touched.exists()


def test_a_class_that_no_concept_needs_is_refused_by_name(tmp_path):
    refused(write(tmp_path / "a.pt", {"key_value_params": Path("x")}), "pathlib")
    refused(write(tmp_path / "b.pt", {"key_value_params": bytearray(9)}), "builtins.bytearray")  # of any size


def test_allowing_settings_leaves_no_trace_in_torch(content, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    importers.convert(write(tmp_path / "a.ckpt", ldm(content)), "<teddy>")
    assert set(torch.serialization.get_safe_globals()) == before


def test_files_that_are_no_archive_are_refused(content, tmp_path):
    path = write(tmp_path / "a.ckpt", ldm(content))
    for size in (0, 100, path.stat().st_size // 2, path.stat().st_size - 30):
        (tmp_path / "short.ckpt").write_bytes(path.read_bytes()[:size])
        refused(tmp_path / "short.ckpt", "not a whole archive")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"C_inv": [1.0]}))
    refused(tmp_path / "plain.pt", "not a whole archive")
    (tmp_path / "concept.pt").write_bytes(dump(importers.from_ldm(ldm(content), "<teddy>")[0]))
    refused(tmp_path / "concept.pt", "not a whole archive")
    refused(tmp_path / "absent.pt", "no file")
    refused(tmp_path, "no file")


def test_archives_that_unpack_to_far_more_are_refused_unread(tmp_path):
    for name, size in (("a/data.pkl", 2**21), ("a/data/0", 2**27)):
        with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, bytes(size))
        assert (tmp_path / "bomb.pt").stat().st_size < 2**18
        refused(tmp_path / "bomb.pt", "far more")
    with open(tmp_path / "model.ckpt", "wb") as file:
        file.truncate(importers.LARGEST + 2**20)
    refused(tmp_path / "model.ckpt", "65 MB", "another kind of file")


def test_tensors_larger_than_their_storage_claims_are_refused_unread(content, tmp_path):
    state = ldm(content) | {"C_inv": torch.ones(1, 1).expand(2**30, 2**30)}  # four exbibytes, stored in four bytes
    refused(write(tmp_path / "a.ckpt", state), "C_inv", "(768, 768)")
    state = ldm(content) | {"target_input": torch.ones(1).expand(2**40)}
    refused(write(tmp_path / "b.ckpt", state), "width")


def test_files_of_other_kinds_are_told_what_they_hold(content, tmp_path):
    refused(write(tmp_path / "ti.pt", {"string_to_param": {}, "name": "cat"}), "string_to_param, name", "Only these")
    refused(write(tmp_path / "list.pt", [torch.ones(2)]), "list")
    refused(write(tmp_path / "empty.pt", {}), "nothing")
    with zipfile.ZipFile(tmp_path / "any.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "any.pt", "another kind of file")
    for damage in ({"embedding": None}, {"embedding": {}}, {"target_output": None}, {"target_input": None},
                   {"target_input": torch.tensor(1.0)}, {"C_inv": None}):
        refused(write(tmp_path / "damaged.ckpt", ldm(content) | damage), "damaged")
    for damage in ({"embed_params": None}, {"key_value_params": [[1], [2]]}, {"key_value_params": [torch.ones(2)]},
                   {"key_value_params": 3}):
        refused(write(tmp_path / "damaged.pt", parts(content) | damage), superclass="teddy")


@pytest.mark.parametrize("road", ["ldm", "parts"])
def test_a_pickle_changed_anywhere_gives_a_concept_or_a_sentence(content, tmp_path, road):
    whole = zipfile.ZipFile(write(tmp_path / "whole.pt", ldm(content) if road == "ldm" else parts(content)))
    entries = {name: whole.read(name) for name in whole.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    chance = random.Random(0)
    for _ in range(30):
        broken = bytearray(entries[pickled])
        broken[chance.randrange(len(broken))] = chance.randrange(256)
        with zipfile.ZipFile(tmp_path / "broken.pt", "w") as archive:  # with checksums that are right
            for name, data in (entries | {pickled: bytes(broken)}).items():
                archive.writestr(name, data)
        try:
            importers.convert(tmp_path / "broken.pt", "<teddy>", "teddy")
        except ValueError as error:
            assert str(error).endswith(".")


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "headless", "convert", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)


def test_the_command_writes_a_concept_and_says_what_was_lost(content, tmp_path):
    path = write(tmp_path / "a.ckpt", ldm(content))
    done = run(path, "--word", "<teddy>", "--out", tmp_path / "made")
    made = tmp_path / "made" / "teddy.safetensors"
    assert done.returncode == 0 and done.stderr == ""
    assert parse(made.read_bytes(), "made").word == "<teddy>"
    assert f"{made} ({made.stat().st_size / 1024:.0f} KB)" in done.stdout and "77 rows" in done.stdout


def test_the_command_fails_with_one_sentence_and_writes_nothing(content, tmp_path):
    done = run(write(tmp_path / "a.pt", parts(content)), "--word", "<teddy>", "--out", tmp_path / "made.safetensors")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "made.safetensors").exists()
    assert "--superclass" in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


# Found by tests/faults


def twice(kind, depth):
    """A few bytes in a pickle, and 2^depth things when all of it is looked at."""
    found = kind(["x"])
    for _ in range(depth):
        found = kind([found, found])
    return found


def test_a_list_of_lists_in_the_place_of_the_superclass_is_not_written_out(content, tmp_path):
    begun = time.process_time()
    refused(write(tmp_path / "a.ckpt", ldm(content, words=[twice(list, 40)])), "does not say what kind of thing")
    assert time.process_time() - begun < 1


def test_tuples_of_tuples_that_would_take_years_to_hash_are_refused_unread(content, tmp_path):
    path = write(tmp_path / "a.ckpt", ldm(content) | {"more": twice(tuple, 60)})
    begun = time.process_time()
    refused(path, "tuples of tuples", "made to do harm")
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("words", [torch.ones(3), torch.ones(1), {"a": 1}, [torch.ones(2)], [7], "teddy"])
def test_a_superclass_that_is_no_list_of_words_is_asked_for(content, tmp_path, words):
    refused(write(tmp_path / "a.ckpt", ldm(content, words=words)), "does not say what kind of thing")


def test_a_tensor_that_numpy_cannot_take_gets_a_sentence(content, tmp_path):
    path = write(tmp_path / "a.ckpt", ldm(content) | {"C_inv": torch._neg_view(content.inverse)})
    with pytest.raises(ValueError, match=r"\.$"):
        importers.convert(path, "<teddy>")
