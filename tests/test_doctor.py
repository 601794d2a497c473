"""Concept Doctor without a host: whatever it is given, it says what that is or what is wrong with it, in sentences."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from perfusion.core import domain as domains
from perfusion.core.concept import dump, save
from perfusion.core.doctor import LISTED, WRONG, examined, of_concept, of_file, of_folders, report, versions
from perfusion.core.domain import Domain
from perfusion.core.encoder import Encoder
from perfusion.core.fidelity import PROMPTS, Curve
from perfusion.core.file import pack, unpacked
from perfusion.core.weight_offset import Offset

from concepts import learnt

ROOT = Path(__file__).parent.parent


def domain(**changes):
    torch.manual_seed(0)
    offsets = {"middle_block.1.transformer_blocks.0.attn2.to_v": Offset(torch.randn(3, 4), torch.randn(2, 6))}
    encoder = Encoder(3, 10, {"clip_l": 5}, {"a.to_v": 4}, hidden=16).eval()
    return Domain(**{"base": "sd1", "prediction": "eps", "superclass": "cat", "tower": "0123" * 16,
                     "encoder": encoder, "offsets": offsets} | changes)


def wrong(lines):
    return [line.removeprefix(WRONG) for line in lines if line.startswith(WRONG)]


def with_nan(data: bytes) -> bytes:
    tensors, metadata = unpacked(data, "", "")
    tensors["target_input"][0] = torch.nan
    return pack(tensors, metadata)


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", b"\x80\x02}.")


def test_a_sound_concept_is_described_and_nothing_is_wrong(tmp_path):
    lines = examined(of_file, save(learnt("sd1"), tmp_path / "mimi.safetensors"))
    assert wrong(lines) == []
    text = " ".join(lines)
    for fact in ("KB", "`<mimi>`", "`cat`", "SD1.5 (eps)", "16 value outputs", "width of 768", "clip_l",
                 "no domain, 5 steps"):
        assert fact in text, fact
    assert "All values of its 20 tensors are numbers." in lines


def test_what_was_measured_of_a_concept_is_said():
    curve = Curve((0.0, 0.5, 1.0), (0.0, 0.3, 0.4), (1.0, 0.8, 0.5), "a" * 64, PROMPTS, 0)
    lines = examined(of_concept, learnt(fidelity=curve))
    assert ("fidelity curve, likeness / obedience: 0.00 / 1.00 at 0, 0.30 / 0.80 at 0.5, 0.40 / 0.50 at 1; "
            "the strength found is 0.83") in lines and wrong(lines) == []


def test_a_sound_domain_is_described_and_nothing_is_wrong(tmp_path):
    lines = examined(of_file, domains.save(domain(), tmp_path / "cats.safetensors"))
    assert wrong(lines) == [] and "domain of `cat`, for SD1.5 (eps)" in lines


@pytest.mark.parametrize("write, said", [
    (lambda path: None, "There is no file"),
    (lambda path: path.mkdir(), "There is no file"),
    (lambda path: path.symlink_to("gone"), "a link leads nowhere"),
    (lambda path: path.write_bytes(b""), "not a whole .safetensors"),
    (lambda path: path.write_bytes(b"\xff" * 99), "not a whole .safetensors"),
    (lambda path: path.write_bytes(dump(learnt())[:-9]), "not a whole .safetensors"),
    (lambda path: path.write_bytes(with_nan(dump(learnt()))), "not numbers"),
    (lambda path: path.write_bytes(pack({"lora_up": torch.ones(3)}, {})), "not a concept of this pack"),
    (lambda path: path.write_bytes(pack({"x": torch.ones(3)}, {"format": "perfusion-concept/1"})), "damaged"),
    (lambda path: path.write_bytes(pack({"x": torch.ones(3)}, {"format": "perfusion-domain/1"})), "damaged"),
    (archive, "headless convert"),
])
def test_a_broken_file_gets_one_sentence(tmp_path, write, said):
    path = tmp_path / "a.safetensors"
    write(path)
    found = wrong(examined(of_file, path))
    assert len(found) == 1 and said in found[0] and found[0].endswith(".")


def test_values_that_are_no_numbers_are_named():
    concept = learnt()
    concept.key_input[3] = torch.inf
    assert "1 of 5 tensors" in wrong(of_concept(concept))[0] and "key_input" in wrong(of_concept(concept))[0]


def test_a_gate_that_cannot_open_is_said():
    assert wrong(of_concept(learnt())) == []
    assert "strength is 0" in wrong(of_concept(learnt().at(0)))[0]
    said, = wrong(of_concept(learnt().replace(training={"steps": 0, "pictures": 1, "far": 1})))
    assert "nothing was encoded" in said and "strength" not in said
    assert wrong(of_concept(learnt().raw(0.9, 0.1))) == []
    assert "mostly shut" in wrong(of_concept(learnt().raw(1.1, 0.1)))[0]


def test_what_nobody_thought_of_is_a_line_after_those_before_it():
    def examine(thing):
        yield "so far it is well"
        yield thing["gone"]

    assert examined(examine, {}) == ["so far it is well", f"{WRONG}This could not be looked at (KeyError: 'gone'). "
                                                          "Report it with the rest."]


def test_every_thing_that_is_wrong_is_counted_and_said_once():
    text = report({"A": ["well", "✗ one."], "B": ["✗ one."], "C": [], "D": ["well", "✗ two."]})
    assert "2 things to look at" in text and text.count("✗ one.") == 1 and text.count("- well") == 2
    assert re.findall("^## .", text, re.M) == ["## A", "## D"]
    assert "Nothing is wrong." in report({"A": ["well"]}) and "1 thing to" in report({"A": ["✗ one."]})


def test_a_word_in_angle_brackets_is_no_tag_and_a_line_is_one_line():
    text = report({"A": ["The concept <mimi> was made for SD1.5", "`<rex>` is read", "over\ntwo"]})
    assert "- The concept `<mimi>` was" in text and "- `<rex>` is" in text and "- over two\n" in text


def test_no_path_of_the_home_folder_is_in_a_report(tmp_path, monkeypatch):
    home, link = tmp_path / "own" / "jane.doe", tmp_path / "jane"
    home.mkdir(parents=True)
    link.symlink_to(home)
    monkeypatch.setenv("HOME", str(link))
    lines = [f"{home}/ComfyUI/models", f"'{link}'", f"{link}/x", str(home).replace("/", "\\\\") + "\\\\y", f"{home}: 3",
             f"{home}land/x", f"/mnt{home}"]
    text = report({str(home): lines}).splitlines()
    assert text[4] == "## ~"
    assert text[6:] == ["- ~/ComfyUI/models", "- '~'", "- ~/x", "- ~\\\\y", "- ~: 3",
                        f"- {home}land/x", f"- /mnt{home}"]
    monkeypatch.setenv("HOME", "/")
    assert "- /models/a" in report({"A": ["/models/a"]})


def test_the_versions_are_those_of_the_pack_and_of_what_it_runs_on():
    text = " ".join(versions())
    assert f"pack {re.search(r'version = .(.+).$', (ROOT / 'pyproject.toml').read_text(), re.M)[1]}," in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text and "Python" in text


def test_folders_say_what_is_in_them_and_which_concepts_do_not_load(tmp_path):
    place = tmp_path / "concepts"
    place.mkdir()
    files = [save(learnt().at(0), place / f"{n:02}.safetensors") for n in range(LISTED + 2)]
    files[1].write_bytes(b"")
    lines = examined(of_folders, "concept", {place: files, tmp_path / "gone": []})
    assert f"{place}: {LISTED + 2} concepts: `00.safetensors`, " in lines[0] and lines[0].endswith(", …")
    assert len(wrong(lines)) == 1 and "01.safetensors" in wrong(lines)[0]
    assert lines[-1] == f"{tmp_path / 'gone'}: no such folder yet"
    (place / "huge.safetensors").write_bytes(b"")
    assert wrong(examined(of_folders, "domain", {place: [place / "huge.safetensors"]})) == []


def test_the_command_looks_at_files_and_at_all_in_a_folder(main, tmp_path, capsys):
    save(learnt(), tmp_path / "in" / "deep" / "mimi.safetensors")
    (tmp_path / "in" / "bad.safetensors").write_bytes(b"")
    domains.save(domain(), tmp_path / "cats.safetensors")
    assert main(["doctor", str(tmp_path / "in"), str(tmp_path / "cats.safetensors"), str(tmp_path / "gone")]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("# Concept Doctor\n\n2 things to look at")
    assert [line.rpartition("/")[2] for line in said.out.splitlines() if line.startswith("## ")][1:] == [
        "bad.safetensors", "mimi.safetensors", "cats.safetensors", "gone"]


def test_the_command_works_in_a_python_without_diffusers_and_the_others_say_what_they_lack(tmp_path):
    def run(*arguments):
        code = "import sys; sys.modules['diffusers'] = None; from headless.__main__ import main; sys.exit(main())"
        return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)

    done = run("doctor", str(save(learnt(), tmp_path / "mimi.safetensors")))
    assert done.returncode == 0 and "Nothing is wrong." in done.stdout, done.stderr
    done = run("demo")
    assert done.returncode == 2 and done.stderr.startswith("This command needs the package diffusers")
