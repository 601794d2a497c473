"""Tune for each line of a table: on one process or two, broken off and gone on with, and with lines that cannot be."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from perfusion.core.concept import load

from test_school import TWO, start

DEMO = Path(__file__).parent.parent / "demo"
TABLE = """picture,word,superclass,steps,seed,out
mimi.png,<mimi>,,,,
"bobo.png; lulu.png",<bobo>,house,3,5,
cut.png,<cut>,,,,
rex.png,<rex>,,,,more
"""
MADE = "mimi.safetensors", "bobo.safetensors", "more/rex.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are started here: with more, sums are rounded in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def people(tmp_path):
    """A table beside pictures, one of which is cut short."""
    for name in "mimi", "bobo", "lulu", "rex":
        shutil.copy(DEMO / "pictures" / f"{name}.png", tmp_path)
    (tmp_path / "cut.png").write_bytes((tmp_path / "mimi.png").read_bytes()[:500])
    (tmp_path / "people.csv").write_text(TABLE, encoding="utf-8")
    return tmp_path / "people.csv"


def command(people, out, *more):
    return list(map(str, ["tune", DEMO, "--manifest", people, "--superclass", "creature", "--steps", 2, "--out", out,
                          *more]))


def bytes_of(out):
    return {name: (out / name).read_bytes() for name in MADE}


def told(said):
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_two_processes_make_the_files_of_one_and_tell_of_each_in_one_line(main, people, tmp_path, capsys):
    process = start(command(people, tmp_path / "two"), *TWO)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "on 2 processes" in said and "1 could not be learnt" in said, said
    capsys.readouterr()
    assert main(command(people, tmp_path / "one")) == 2
    heard = capsys.readouterr()
    assert "1 could not be learnt" in heard.err and heard.out.count("\n") == 4
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
    assert {line["process"] for line in told(said)} == {0, 1}
    for out, printed in (tmp_path / "one", heard.out), (tmp_path / "two", said):
        lines = [json.loads(line) for file in out.glob("people-*.jsonl") for line in file.read_text().splitlines()]
        assert sorted(map(str, lines)) == sorted(map(str, told(printed))) and len(lines) == 4
        for line in lines:
            if line["word"] == "<cut>":
                assert line["line"] == 4 and "cut.png' is not a picture" in line["error"] and "bytes" not in line
                continue
            learnt = load(line["file"])
            assert (learnt.word, learnt.superclass) == (line["word"], line["superclass"])
            assert line["bytes"] == Path(line["file"]).stat().st_size and line["seconds"] > 0
            assert (line["steps"], line["loss"]) == (learnt.training["steps"], learnt.training["loss"])
    concepts = {name: load(tmp_path / "one" / name) for name in MADE}
    assert [c.superclass for c in concepts.values()] == ["creature", "house", "creature"]
    assert [c.training["pictures"] for c in concepts.values()] == [1, 2, 1]
    assert [(c.training["steps"], c.training["seed"]) for c in concepts.values()] == [(2, 0), (3, 5), (2, 0)]


def test_a_concept_of_a_table_is_the_one_that_the_command_learns_alone(main, people, tmp_path, capsys):
    main(command(people, tmp_path / "many"))
    assert main(["tune", str(DEMO), "--superclass", "house", "--word", "<bobo>", "--steps", "3", "--seed", "5", "--out",
                 str(tmp_path / "bobo.safetensors"), *(str(people.parent / f"{k}.png") for k in ("bobo", "lulu"))]) == 0
    assert (tmp_path / "bobo.safetensors").read_bytes() == bytes_of(tmp_path / "many")["bobo.safetensors"]


def test_a_run_that_was_killed_goes_on_and_ends_with_the_files_of_an_unbroken_one(main, people, tmp_path, capsys):
    out = tmp_path / "killed"
    main(command(people, tmp_path / "unbroken"))
    process = start(command(people, out))
    while process.poll() is None and not (out / MADE[0]).exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    there = {path: path.stat().st_mtime_ns for path in map(out.joinpath, MADE) if path.exists()}
    assert 1 <= len(there) < 3
    capsys.readouterr()
    assert main(command(people, out)) == 2
    heard = capsys.readouterr()
    assert f"{len(there)} have their file already" in heard.err and len(told(heard.out)) == 4 - len(there)
    assert bytes_of(out) == bytes_of(tmp_path / "unbroken")
    assert all(path.stat().st_mtime_ns == before for path, before in there.items())


def test_what_failed_is_tried_again_and_nothing_else(main, people, tmp_path, capsys):
    assert main(command(people, tmp_path / "out")) == 2
    before = bytes_of(tmp_path / "out")
    shutil.copy(people.parent / "mimi.png", people.parent / "cut.png")
    capsys.readouterr()
    assert main(command(people, tmp_path / "out")) == 0
    heard = capsys.readouterr()
    assert [line["word"] for line in told(heard.out)] == ["<cut>"] and "error" not in told(heard.out)[0]
    assert "1 concepts learnt, 3 skipped, 0 failed" in heard.err and bytes_of(tmp_path / "out") == before
    assert main(command(people, tmp_path / "out")) == 0


def test_a_concept_that_goes_wrong_while_it_is_learnt_is_told_and_the_others_go_on(main, people, tmp_path, capsys,
                                                                                   monkeypatch):
    """One diverges, one needs more memory than there is, and one would go on from a file that is no concept."""
    from headless.learn import host_diffusers, tuning

    latents = host_diffusers.DiffusersHost.latents

    def wild(steps, **settings):
        return tuning_of(steps=steps, learning_rate=1e6 if steps == 200 else 0.3, **settings)

    def full(host, images):
        if host.superclass == "house":
            raise torch.cuda.OutOfMemoryError("none is left")
        return latents(host, images)

    tuning_of = tuning.Tuning
    monkeypatch.setattr(tuning, "Tuning", wild)
    monkeypatch.setattr(host_diffusers.DiffusersHost, "latents", full)
    (people.parent / "other.safetensors").write_bytes(b"no concept")
    people.write_text("picture,word,superclass,steps,concept\nmimi.png,<a>,,200,\nmimi.png,<b>,house,2,\n"
                      "rex.png,<c>,,2,other.safetensors\nrex.png,<d>,,2,\n")
    assert main(command(people, tmp_path / "out")) == 2
    heard = capsys.readouterr()
    errors = [line.get("error", "") for line in told(heard.out)]
    assert "3 could not be learnt" in heard.err and (tmp_path / "out" / "d.safetensors").exists()
    assert "Learning stopped at step" in errors[0]
    assert "none is left" in errors[1] and "other.safetensors" in errors[2] and not errors[3]


@pytest.mark.parametrize("table, says", [
    ("", "no picture"), ("picture,word\n", "nothing to learn"), ("word\n<a>\n", "It has no picture"),
    ("picture;word\nmimi.png;<a>\n", "unknown or double 'picture;word'"), ("picture,name\nmimi.png,a\n", "'name'"),
    ("picture,word,word\nmimi.png,<a>,<b>\n", "double 'word'"),
    ("picture\nmimi.png\n\nno.png\n", "line 4: there is no picture"),
    ("picture,word\n,<a>\n", "line 2: it names no picture"),
    ("picture,mask\nmimi.png,no.png\n", "line 2: there is no mask"),
    ("picture,concept\nmimi.png,no.safetensors\n", "line 2: there is no concept"),
    ("picture,word\nmimi.png,mimi\n", "line 2: The concept's word is written in angle brackets"),
    ("picture,word\nmimi.png,<a>\nrex.png,<b>\nbobo.png,<a>\n", "line 4: its file is"),
    ("picture\nmimi.png\nrex.png\n", "as that of line 2: give one another word or out"),
    ("picture,word,out\nmimi.png,<a>,x/../b.safetensors\nrex.png,<b>,\n", "line 3: its file is"),
    ("picture,steps\nmimi.png,many\n", "line 2: steps is a whole number from 1; got 'many'"),
    ("picture,steps\nmimi.png,0\n", "from 1; got '0'"), ("picture,seed\nmimi.png,-1\n", "line 2: seed is a whole"),
    ("picture,word\nmimi.png,<a>,7\n", "line 2: it has more cells than there are columns ('7')"),
    ("picture,superclass\nmimi.png,wibble\n", "line 2: "), ('picture,word\n"mimi.png,<a>\n', "comma-separated values"),
    ("picture,word\nmimi.png,<\udce4>\n", "in UTF-8"),
])
def test_a_table_that_cannot_be_is_told_by_its_lines_before_anything_is_learnt(main, people, tmp_path, capsys, table,
                                                                               says):
    people.write_bytes(table.encode(errors="surrogateescape"))
    assert main(command(people, tmp_path / "out")) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_all_that_is_wrong_with_a_table_is_told_at_once_but_not_without_end(main, people, tmp_path, capsys):
    people.write_text("picture,word\n" + "".join(f"{k}.png,{k}\n" for k in range(30)))
    assert main(command(people, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "line 2: there is no picture" in said and "line 3: The concept's word" in said and "and 40 more" in said


@pytest.mark.parametrize("arguments, says", [
    (["--superclass", "creature"], "got neither"), (["x.png", "--manifest", "x.csv"], "got both"),
    (["x.png"], "--superclass"), (["--manifest", "x.csv"], "x.csv"),
    (["--manifest", "x.csv", "--out", "x.safetensors"], "names the folder for all"),
])
def test_what_a_tune_is_asked_of_is_pictures_or_a_table(main, capsys, arguments, says):
    assert main(["tune", str(DEMO), *arguments]) == 2
    assert says in capsys.readouterr().err
