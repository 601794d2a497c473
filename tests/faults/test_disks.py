"""Disks that are full, read-only, or another one; and two servers on one folder. All of it real, in forks."""

import hashlib
import logging
import os
import time

import pytest
import torch

from perfusion.core import concept as concepts
from perfusion.core.covariance import inverse_of
from perfusion.core.quick_tune import Cache

import disks
from concepts import learnt
from killed import fork

pytestmark = pytest.mark.host
ALL = pytest.mark.faults


def covariance(folder):
    def encode(some):
        return [torch.randn(9, 32, generator=torch.Generator().manual_seed(int(line))) for line in some]

    return inverse_of(encode, "an encoder", [str(k) for k in range(64)], folder, lambda done, total: None)[0]


def refuses(work, *words):
    """Asserts that work gets a sentence of ours with these words."""
    try:
        work()
    except OSError as error:
        assert all(word in error.strerror for word in (*words, "Nothing was changed there")), error
    else:
        raise AssertionError("it was written")


def caches(folder, concept):
    """What a tune keeps where it cannot: a warning, and nothing half-written."""
    said, heard = [], logging.Handler()
    heard.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(heard)
    cache = Cache(folder / "cache", "key")
    cache.write(concept, [torch.zeros(1, 256, 256, 3)] * 2)
    assert cache.read()[1] is None
    expected = covariance(folder)
    assert torch.equal(covariance(folder), expected)
    assert any("not kept for a re-queue" in line for line in said)
    assert any("computed anew each time" in line for line in said)


@disks.needed
def test_a_full_disk_leaves_the_old_file_says_so_and_stops_no_tune(pack, tmp_path):
    from perfusion.nodes import folders

    def work():
        folders.saved().mkdir(parents=True, exist_ok=True)
        disks.small(folders.saved(), 64 * 1024)
        old = folders.save(learnt(), "mimi")
        (folders.saved() / "filler").write_bytes(bytes(48 * 1024))
        refuses(lambda: folders.save(learnt("sd1"), "mimi"), "No space left", "Make room")
        refuses(lambda: concepts.save(learnt("sd1"), old), "No space left", "Make room")
        assert concepts.load(old).base == "creature"
        assert sorted(os.listdir(folders.saved())) == ["filler", "mimi.safetensors"]
        (folders.saved() / "filler").write_bytes(bytes(58 * 1024))  # over the old one, so that little is left
        caches(folders.saved(), learnt("sd1"))

    assert fork(work) == 0


@disks.needed
def test_a_folder_that_is_read_only_says_so_reads_all_the_same_and_stops_no_tune(pack, tmp_path):
    from perfusion.nodes import folders

    name = folders.save(learnt(), "there").name

    def work():
        disks.read_only(folders.saved())
        assert name in folders.names() and concepts.load(folders.find(name)).word == "<mimi>"
        assert folders.save(learnt(), "there").name == name  # it is there already
        refuses(lambda: folders.save(learnt("sd1"), "new"), "Read-only file system", "choose another folder")
        caches(folders.saved(), learnt())

    assert fork(work) == 0
    assert "new.safetensors" not in folders.names()


@disks.needed
def test_models_on_another_disk_than_temporary_files_are_written_and_listed(pack, tmp_path):
    from perfusion.nodes import folders

    def work():
        folders.saved().mkdir(parents=True, exist_ok=True)
        disks.small(folders.saved(), 2**20)
        assert os.stat(folders.saved()).st_dev != os.stat(tmp_path).st_dev
        path = folders.save(learnt("sd1"), "elsewhere")
        assert path.name in folders.names() and os.listdir(folders.saved()) == [path.name]
        assert concepts.load(concepts.save(learnt(), path)).base == "creature"
        assert torch.equal(covariance(folders.saved()), covariance(folders.saved()))

    assert fork(work) == 0


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=ALL)], ids=["share", "all"])
def test_two_servers_that_save_one_name_at_once_lose_nothing_and_both_are_listed(pack, rounds, tally):
    from perfusion.nodes import folders

    kinds = ["dog", "cat", "house"]
    for k in range(rounds):
        begin = time.monotonic() + 0.15

        def one(kind, k=k, begin=begin):
            concept = learnt("sd1", superclass=kind)
            while time.monotonic() < begin:
                pass
            folders.save(concept, f"round{k}")

        children = [fork(lambda kind=kind, one=one: one(kind), wait=False) for kind in kinds]
        assert not any(os.waitpid(child, 0)[1] for child in children)
        mine = [name for name in folders.names() if name.startswith((f"round{k}.", f"round{k}-"))]
        assert sorted(concepts.load(folders.find(name)).superclass for name in mine) == sorted(kinds), mine
        assert not [path for path in folders.saved().iterdir() if path.suffix == ".tmp"]
    tally("rounds of servers that save one name at once", rounds=rounds)


def test_a_concept_file_that_is_replaced_is_loaded_anew_even_within_one_tick_of_the_clock(pack):
    from perfusion.nodes import folders

    node = pack["PerfusionLoadConcept"]
    path = folders.save(learnt(superclass="cat"), "swapped")
    first, told = node.execute(path.name)[0], node.fingerprint_inputs(path.name)
    assert node.fingerprint_inputs(path.name) == told
    times = path.stat()
    concepts.save(learnt(superclass="dog"), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and node.fingerprint_inputs(path.name) != told
    assert (first.superclass, node.execute(path.name)[0].superclass) == ("cat", "dog")
    digest = hashlib.sha256(concepts.dump(learnt(superclass="cat"))).hexdigest()
    with pytest.raises(ValueError, match="made with another 'swapped.safetensors'"):
        node.execute(path.name, "", digest)
