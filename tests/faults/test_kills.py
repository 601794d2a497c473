"""`kill -9` while something is written or learnt: every file is the old or the new one, and going on works."""

import random
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from perfusion.core import concept as concepts
from perfusion.core import quick_tune as quick
from perfusion.core.checkpoint import Checkpoint
from perfusion.core.covariance import PACKAGED, inverse_of
from perfusion.core.file import unpacked
from perfusion.core.school import Schooling
from perfusion.core.tune import Tuning

import test_school
import test_school_loop
from concepts import learnt
from killed import fork, killed_after, killed_at_byte, killed_at_line, killed_somewhere, lines

ALL = pytest.mark.faults
host, place, school, unbroken = test_school_loop.host, test_school.place, test_school.school, test_school.unbroken


def shares(few, all_):
    """Few of it, and all of it in `make test-faults`."""
    return pytest.mark.parametrize("count", [few, pytest.param(all_, marks=ALL)], ids=["share", "all"])


def whole(folder):
    """The files of a folder that have an end of ours, each of which is whole; what was left aside has another end."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".txt"):
        if path.name.startswith("."):
            assert path.suffix == ".tmp", path
        elif path.suffix in (".safetensors", ".pictures"):
            unpacked(path.read_bytes(), path.name, "")
            found.append(path)
        else:
            assert path.suffix in (".pt", ".png"), path
            found.append(path)
    return found


@pytest.mark.host
@shares(8, 60)
def test_a_concept_that_was_being_saved_is_the_old_one_or_the_new_one(count, pack, tally):
    from perfusion.nodes import folders

    r, old, new = random.Random(0), learnt("sd1"), learnt("sd1", superclass="dog")
    path = folders.save(old, f"over{count}")
    bytes_of = concepts.dump(old), concepts.dump(new)

    def over():
        concepts.save(new, path)

    def beside():
        folders.save(new, f"beside{count}")

    kills, states = 0, set()
    for work in over, beside:
        total = lines(work)
        for path_now in folders.saved().glob(f"beside{count}*"):
            path_now.unlink()
        for k in range(count):
            concepts.save(old, path)
            if k % 3 == 0:
                kills += killed_at_byte(work, r.randrange(len(bytes_of[1])))
            elif k % 3 == 1:
                kills += killed_somewhere(work, total, r)
            else:
                kills += killed_at_line(work, total - r.randrange(min(total, 12)))
            states.add(bytes_of.index(path.read_bytes()))
            for name in folders.names():
                assert concepts.load(folders.find(name)).word == "<mimi>"
            assert len(whole(folders.saved())) == len(folders.names())
    assert states == {0, 1} or count < 10
    over()
    beside()
    assert path.read_bytes() == bytes_of[1] and f"beside{count}.safetensors" in folders.names()
    tally("kills", **{"while a concept is saved": kills})


@shares(6, 50)
def test_a_covariance_that_was_being_written_is_computed_again(count, tmp_path, tally):
    r, lines_read = random.Random(1), [f"a caption {k}" for k in range(64)]

    def encode(some):
        return [torch.randn(9, 32, generator=torch.Generator().manual_seed(lines_read.index(line))) for line in some]

    def work(folder=tmp_path):
        return inverse_of(encode, "an encoder", lines_read, folder, lambda done, all_: None)

    expected, kills, total = work(tmp_path / "other")[0], 0, lines(work)
    for k in range(count):
        for path in whole(tmp_path / "covariance"):
            path.unlink()
        if k % 3 == 0:
            kills += killed_at_byte(work, r.randrange(4000))
        elif k % 3 == 1:
            kills += killed_somewhere(work, total, r)
        else:
            kills += killed_at_line(work, total - r.randrange(15))
        found = whole(tmp_path / "covariance")
        assert len(found) <= 1
        if k % 5 == 0:
            assert torch.equal(work()[0], expected)
    assert torch.equal(work()[0], expected)
    tally("kills", **{"while a covariance is computed": kills})


class Deaf:
    """Watches a tune and says nothing of it."""

    def captions(self, *heard):
        pass

    picture = step = note = captions


@pytest.mark.host
@shares(3, 40)
def test_a_tune_that_was_killed_is_learnt_as_if_it_had_not_been(count, tiny, tmp_path, tally):
    r, settings, kills = random.Random(2), Tuning(steps=2, batch=1, resolution=64, templates=("a {}", "the {}")), 0
    model, clip, vae = tiny("sd1")
    captions = PACKAGED.read_text(encoding="utf-8").splitlines()[::128]
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(7))

    def tune(folder, stop=False):
        folder.mkdir(exist_ok=True)
        if not (folder / "captions.txt").exists():
            (folder / "captions.txt").write_text("\n".join(captions), encoding="utf-8")
        watch = Deaf()
        if stop:
            watch.step = stopped
        with torch.inference_mode():
            return quick.quick_tune(model, clip, vae, picture, "cat", "<mimi>", settings, None, None, folder, watch,
                                    lambda concept: concepts.save(concept, folder / "stopped.safetensors"))

    def stopped(progress):
        raise KeyboardInterrupt

    def work():
        tune(tmp_path / "killed")

    def keeping():
        try:
            tune(tmp_path / "killed", stop=True)
        except KeyboardInterrupt:
            pass

    expected = tune(tmp_path / "unbroken")
    total = lines(lambda: tune(tmp_path / "counted"))
    kept = lines(lambda: fork_free(keeping, tmp_path / "killed"))
    for k in range(count):
        if k % 4 == 3:
            kills += killed_at_line(keeping, kept - r.randrange(min(kept, 60)))
        elif k % 4 == 2:
            kills += killed_at_line(work, total - r.randrange(100))  # as the cache is written
        else:
            kills += killed_somewhere(work, total, r)
        assert {p.parent.name for p in whole(tmp_path / "killed")} <= {"cache", "covariance", "killed"}
        if r.random() < 0.5:  # else what was found is gone on from
            for path in whole(tmp_path / "killed"):
                path.unlink()
    again = tune(tmp_path / "killed")
    assert concepts.dump(again[0]) == concepts.dump(expected[0])
    for now, then in zip(again[1:], expected[1:]):
        assert (now - then).abs().max() <= 1 / 255
    tally("kills", **{"while a concept is learnt": kills})


def fork_free(work, folder):
    work()
    for path in whole(folder):
        path.unlink()


@shares(4, 50)
def test_a_training_that_is_killed_again_and_again_ends_as_an_unbroken_one(count, host, tmp_path, tally):
    r, settings, kills, runs = random.Random(3), Schooling(steps=4, batch=2), 0, 0
    expected, _ = test_school_loop.taught(host, settings)

    def work(folder=tmp_path):
        kept = Checkpoint(folder / "x.pt", {})
        course, _ = test_school_loop.taught(host, settings, checkpoint=kept, every=1)
        safetensors.torch.save_file({name: t.contiguous() for name, t in course.state_dict().items()},
                                    folder / "learnt.safetensors")

    total = lines(lambda: work(tmp_path / "counted") if (tmp_path / "counted").mkdir() is None else None)
    while kills < count:
        runs += 1
        assert runs < 6 * count
        died = killed_somewhere(work, total, r) if runs % 4 else killed_at_byte(work, r.randrange(20_000))
        kills += died
        path = tmp_path / "x.pt"
        assert not path.exists() or 1 <= torch.load(path, weights_only=True)["step"] <= 4
        if not died:
            found = safetensors.torch.load_file(tmp_path / "learnt.safetensors")
            assert all(torch.equal(found[name], t) for name, t in expected.state_dict().items())
            path.unlink()
    assert fork(work) == 0
    found = safetensors.torch.load_file(tmp_path / "learnt.safetensors")
    assert all(torch.equal(found[name], t) for name, t in expected.state_dict().items())
    tally("kills", **{"while a domain is trained, in the loop": kills})


@ALL
@pytest.mark.parametrize("count", [6])
def test_the_training_command_that_is_killed_ends_as_an_unbroken_one(count, place, school, unbroken, tmp_path, tally):
    r, out, kills = random.Random(4), tmp_path / "killed.safetensors", 0
    checkpoint = out.with_suffix(".work") / "checkpoint.pt"

    def work():
        assert school(place, out, "--every", 1) == 0

    begun = time.monotonic()
    assert fork(work) == 0
    took = time.monotonic() - begun  # on this machine, for what is shorter is the sooner at its end
    while kills < count:
        checkpoint.unlink(missing_ok=True)
        while not killed_after(work, r.uniform(0, took)):
            checkpoint.unlink()
        kills += 1
        whole(tmp_path)
        if r.random() < 0.5:  # and killed again where it went on
            kills += killed_after(work, r.uniform(0, took))
            whole(tmp_path)
        out.unlink(missing_ok=True)
        assert fork(work) == 0
        assert test_school.closest(test_school.load(out), unbroken) == 0
    tally("kills", **{"while a domain is trained, as a command": kills})


def test_what_is_killed_is_killed_in_the_midst_of_it(tmp_path):
    """Else nothing was shown: at each line a little more is done, and at each byte a little more is written."""
    sizes = []
    concept = replace(learnt("sd1"), superclass="dog")

    def work():
        concepts.save(concept, tmp_path / "mimi.safetensors")

    for byte in 0, 1, 20_000:
        assert killed_at_byte(work, byte)
        (aside,) = tmp_path.iterdir()
        sizes.append(aside.stat().st_size)
        aside.unlink()
    assert sizes == [0, 1, 20_000]
    total = lines(work)
    (tmp_path / "mimi.safetensors").unlink()
    done = [(killed_at_line(work, line), len(list(tmp_path.iterdir()))) for line in (1, total // 2, total, total + 1)]
    assert [died for died, _ in done] == [True, True, True, False]
    assert done[0][1] == 0 < done[2][1]
