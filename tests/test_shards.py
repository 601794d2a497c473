"""Train Domain from webdataset shards: they learn as the folder that they were made of, broken off and on two processes
too, and what is wrong with them is said in a sentence."""

import gzip
import io
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from webdataset import ShardWriter

import test_school
from test_school import ROOT, TWO, apart, closest, command, load

place, school, unbroken = test_school.place, test_school.school, test_school.unbroken
FEW = 6  # of ten pictures; the others are read as they are needed
# `python -m headless` that keeps no more than FEW
STREAMED = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from headless import __main__, shards; " \
           f"shards.SAMPLE = {FEW}; sys.exit(__main__.main())\n"


@pytest.fixture(scope="module")
def packed(place, tmp_path_factory):
    """Beside model and tower of `place` its pictures in three shards, as webdataset writes them."""
    packed, folder = tmp_path_factory.mktemp("packed"), place / "pictures"
    for name in "model", "tower":
        (packed / name).symlink_to(place / name)
    (packed / "pictures").mkdir()
    with ShardWriter(str(packed / "pictures" / "set-%03d.tar"), maxcount=4, verbose=0) as shards:
        for path in sorted(folder.rglob("*.png")):
            text = path.with_suffix(".txt")
            shards.write({"__key__": path.relative_to(folder).with_suffix("").as_posix(), "png": path.read_bytes()}
                         | ({"txt": text.read_bytes()} if text.exists() else {}))
    return packed


@pytest.fixture
def shards(main):
    """The module under test."""
    import headless.domain  # noqa: F401

    return sys.modules["headless.shards"]


@pytest.fixture
def seeing(shards, place):
    """(host, tower, resolution) of `place`."""
    commands = sys.modules["headless.domain"]
    pipe, folder = commands.open_model(place / "model")
    return commands.host_diffusers.DiffusersHost(pipe, "creature", folder), commands.open_tower(place / "tower"), 64


@pytest.fixture(scope="module")
def streamed(packed, tmp_path_factory):
    """(start a run of which little is kept in a process of its own, the domain of an unbroken one)."""
    script = tmp_path_factory.mktemp("streamed") / "streamed.py"
    script.write_text(STREAMED)

    def start(out, *more, launch=()):
        launch = ["-m", *launch[:-1]] if launch else []  # without its last -m, as the script is no module
        return subprocess.Popen([sys.executable, *launch, str(script), *command(packed, out, *more)], cwd=ROOT,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    process = start(script.parent / "unbroken.safetensors")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return start, load(script.parent / "unbroken.safetensors")


def test_shards_learn_bit_for_bit_what_their_folder_does(packed, school, unbroken, tmp_path, monkeypatch):
    assert school(packed, tmp_path / "x.safetensors") == 0
    assert closest(load(tmp_path / "x.safetensors"), unbroken) == 0
    assert {p.name.partition("-")[0] for p in tmp_path.glob("x.work/*")} == {"checkpoint.pt", "index", "sample", "seen"}


def test_what_is_read_as_it_is_needed_is_what_would_have_been_kept(shards, packed, seeing, tmp_path):
    album = shards.opened(str(packed / "pictures"), tmp_path)
    latents, tokens = sys.modules["headless.album"].seen(album, range(10), tmp_path, *seeing)
    rows, turns = torch.tensor([3, 0, 5, 3]), torch.tensor([1, 4, 2, 0])
    x, f, said = shards.passing(album, rows, turns, 6, *seeing)
    torch.testing.assert_close(x, latents[rows], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(f, tokens[rows], atol=2e-3, rtol=2e-3)
    lines = [shards.captions_of(album, row, seeing[0]) for row in rows.tolist()]
    assert said == [some[turn % len(some)] for some, turn in zip(lines, turns.tolist())]
    assert {len(some) for some in lines} == {2, 9}


def test_a_broken_run_from_shards_ends_as_an_unbroken_one(streamed, tmp_path):
    start, expected = streamed
    out = tmp_path / "broken.safetensors"
    process, checkpoint = start(out, "--every", 1), out.with_suffix(".work") / "checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    process.kill()
    said, _ = process.communicate()
    assert checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] < 4, said
    process = start(out)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "read through" not in said and "step 4 of 4" in said, said
    assert closest(load(out), expected) == 0


def test_two_processes_learn_from_shards_what_one_does(streamed, unbroken, tmp_path):
    start, expected = streamed
    process = start(tmp_path / "two.safetensors", launch=TWO)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "on 2 processes" in said, said
    assert apart(expected, load(tmp_path / "two.safetensors")) < 0.05
    assert apart(expected, unbroken) < 0.5  # which another sample standardised


def test_a_sample_is_of_all_parts_of_a_set_and_of_what_is_held_out(shards, packed, tmp_path, monkeypatch):
    album = shards.opened(str(packed / "pictures"), tmp_path)
    assert album.sample(0) == list(range(10))
    monkeypatch.setattr(shards, "SAMPLE", FEW + 1)
    samples = [album.sample(seed) for seed in range(20)]
    assert samples[0] == album.sample(0) and len(set(map(tuple, samples))) > 3
    for found in samples:
        assert found[-4:] == [6, 7, 8, 9] and [row // 2 for row in found[:-4]] == [0, 1, 2]


def spoil(path, kind, name):
    """Write over the middle of a file in a shard."""
    with tarfile.open(path) as tar:
        member = next(m for m in tar if m.name == f"{name}.{kind}")
    with path.open("r+b") as file:
        file.seek(member.offset_data + (200 if kind == "png" else 0))
        file.write(b"\xff" * (member.size - 200 if kind == "png" else member.size))


@pytest.mark.parametrize("kind", ["png", "txt"])
def test_where_one_cannot_be_learnt_from_the_next_takes_its_place_and_it_is_said(
        shards, packed, seeing, tmp_path, capfd, kind):
    folder = Path(shutil.copytree(packed / "pictures", tmp_path / "pictures"))
    spoil(folder / "set-000.tar", kind, "4")  # row 2
    album, turns = shards.opened(str(folder), tmp_path), torch.tensor([5, 5])
    found = shards.passing(album, torch.tensor([2, 1]), turns, 6, *seeing)
    assert f"{folder / 'set-000.tar'}: 4.{kind}'" in capfd.readouterr().err
    instead = shards.passing(album, torch.tensor([3, 1]), turns, 6, *seeing)
    assert torch.equal(found[0], instead[0]) and torch.equal(found[1], instead[1]) and found[2] == instead[2]
    with pytest.raises(ValueError, match=rf"set-000\.tar: 4\.{kind}"):
        album.picture(2) if kind == "png" else shards.captions_of(album, 2, seeing[0])


def test_a_sample_that_cannot_be_learnt_from_stops_before_anything_is_learnt(packed, school, tmp_path, capsys):
    shutil.copytree(packed, tmp_path, symlinks=True, dirs_exist_ok=True)
    spoil(tmp_path / "pictures" / "set-001.tar", "txt", "more/1")
    assert school(tmp_path, tmp_path / "x.safetensors") == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'pictures' / 'set-001.tar'}: more/1.txt" in said and "UTF-8" in said


def test_another_set_of_shards_is_told_and_the_same_one_elsewhere_is_not(shards, packed, tmp_path):
    folder = Path(shutil.copytree(packed / "pictures", tmp_path / "moved"))
    first, again = (shards.opened(str(where), tmp_path) for where in (packed / "pictures", folder))
    assert first.hash == again.hash and first.state != again.state
    one = shards.opened(str(folder / "set-00{0,1,2}.tar"), tmp_path)
    assert one.hash == first.hash and one.name(9) == f"{folder / 'set-002.tar'}: more/9.png"
    assert shards.opened(str(folder / "set-00[01].tar"), tmp_path).hash != first.hash
    with tarfile.open(folder / "set-002.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("11.txt"))
        tar.addfile(tarfile.TarInfo("11.png"))
    assert shards.opened(str(folder), tmp_path).hash != first.hash


def test_a_training_does_not_go_on_with_other_shards(packed, school, tmp_path, capsys):
    shutil.copytree(packed, tmp_path, symlinks=True, dirs_exist_ok=True)
    assert school(tmp_path, tmp_path / "x.safetensors") == 0
    shutil.copy(tmp_path / "pictures" / "set-000.tar", tmp_path / "pictures" / "set-003.tar")
    assert school(tmp_path, tmp_path / "x.safetensors") == 2
    said = capsys.readouterr().err
    assert "of a training with" in said and "pictures" in said


def picture(side=8):
    data = io.BytesIO()
    Image.new("RGB", (side, side)).save(data, "PNG")
    return data.getvalue()


def shard(path, *names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(picture())
            tar.addfile(member, io.BytesIO(picture()))
    return path


@pytest.mark.parametrize("said, says", [
    ("empty.tar", "empty.tar' cannot be read as"), ("none.tar", "holds no picture"),
    ("text.tar", "text.tar' cannot be read as"), ("packed.tar.gz", "an uncompressed .tar"),
    ("small.tar", "holds 3 pictures"), ("up.tar", "names a place outside of it"),
    ("root.tar", "names a place outside of it"), ("set-{0..2}.tar", "set-2.tar' is not there"),
    ("no-*.tar", "is not there"),
    ("set-{0..2.tar", "race"), ("nowhere", "is no folder"), ("https://host/set-{0..9}.tar", "Mount the store"),
    ("pipe:cat set.tar", "Mount the store"), ("both", "both shards (.tar) and pictures"),
    ("folder.tar", "holds 0 pictures"),
])
def test_what_no_training_can_read_gets_a_sentence_and_nothing_is_unpacked(shards, tmp_path, said, says, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    Path("empty.tar").write_bytes(b"")
    Path("text.tar").write_text("no archive" * 100)
    Path("folder.tar").mkdir()
    shard("none.tar", "a.txt")
    for name in "small.tar", "set-0.tar", "set-1.tar":
        shard(name, "a.png", "b.png", "c.png")
    Path("packed.tar.gz").write_bytes(gzip.compress(Path("small.tar").read_bytes()))
    shard("up.tar", "a.png", "../b.png")
    shard("root.tar", "a.png", str(tmp_path / "b.png"))
    Path("both").mkdir()
    shard("both/a.tar", "a.png")
    Path("both/a.png").write_bytes(picture())
    with pytest.raises(ValueError, match=r".") as told:
        shards.opened(said, tmp_path / "work")
    assert says in str(told.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"in", "work"}
    assert {p.suffix for p in tmp_path.glob("work/*")} <= {".safetensors"}


def test_a_shard_that_is_cut_anywhere_is_not_taken_for_a_whole_one(shards, tmp_path):
    whole = shard(tmp_path / "a.tar", "a.png", "b.png", "c.png")
    data = whole.read_bytes()
    found = shards.index(whole)
    end = found[-1][1] + 512  # where the last picture's blocks end
    assert len(found) == 3 and found[-1][2] <= 512
    for cut in range(0, end + 1, 64):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="cannot be read as"):
            shards.index(tmp_path / "cut.tar")


def test_names_of_any_kind_are_kept(shards, tmp_path):
    names = ["ä/Katze 1.PNG", "./b.jpeg", "c" * 300 + ".webp", "d.png", "d.jpg"]
    shard(tmp_path / "a.tar", *names, "ä/Katze 1.txt", "e.seg.png", "f", "__meta__.json")
    shard(tmp_path / "b.tar", *(f"{k}.png" for k in range(5)))
    album = shards.opened(str(tmp_path / "*.tar"), tmp_path / "work")
    assert [album.name(k) for k in range(5)] == [f"{tmp_path / 'a.tar'}: {name}" for name in names]
    assert album.beside(0) == picture() and album.beside(1) is None and album.picture(9).shape == (1, 8, 8, 3)
