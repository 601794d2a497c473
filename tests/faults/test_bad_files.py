"""Thousands of bad files and strings: each is read, and then is good for all that is done with it, or gets a sentence.

Changes are drawn from a seed by what a file is made of (mutants.py), and for a third of them led by the lines of our
own code that they reach. What is judged badly is in build/faults (judged.py).
"""

import base64
import json
import random
import zipfile

import pytest
import torch

from perfusion.core import concept as concepts
from perfusion.core import domain as domains
from perfusion.core.encoder import Encoder
from perfusion.core.import_domain import pretrained
from perfusion.core.importers import convert
from perfusion.core.members import Members
from perfusion.core.public_encoder import fold
from perfusion.core.weight_offset import Offset

import published_e4t as published
from concepts import learnt
from judged import judged
from mutants import (
    archive_changed,
    bomb,
    commands,
    entries_of,
    file_changed,
    hostile,
    saved,
    state_changed,
    text_changed,
)

ALL = pytest.mark.faults
SHARE = 1 / 40  # of it in `make test`
NAME = "input_blocks.1.1.transformer_blocks.0.attn2.to_v"


@pytest.fixture(params=[SHARE, pytest.param(1, marks=ALL)], ids=["share", "all"])
def many(request):
    """How many files of so many."""
    return lambda count: max(20, int(count * request.param))


def good_concept(found):
    """Asserts that what was read can be written, again read, carried, shown and told of."""
    for precision in "fp16", "int8":
        try:
            data = concepts.dump(found.replace(precision=precision))
        except ValueError as error:
            assert str(error).endswith("another seed."), error  # beyond fp16, which a file in fp32 may hold
            return
        again = concepts.parse(data, "again")
        assert concepts.dump(again) == data and again.superclass == found.superclass
    text, digest = concepts.embed(found)
    assert concepts.unpack(text, digest).word == found.word
    json.dumps([found.energy, found.gate_bias, found.scale, found.temperature], allow_nan=False)
    assert found.off in (True, False) and concepts.check_word(found.word)
    assert all(len(t) and t.isfinite().all() for t in found.target_output.values())


def read_concept(data):
    good_concept(concepts.parse(data, "mimi.safetensors"))


def read_text(text):
    good_concept(concepts.unpack(text))


def read_domain(data):
    found = domains.parse(data, "cats.safetensors")
    try:
        again = domains.dump(found)
    except ValueError as error:
        assert "diverged" in str(error), error
        return
    assert domains.dump(domains.parse(again, "again")) == again
    if isinstance(found.encoder, Encoder):
        E, u = found.encoder(torch.zeros(1, len(found.encoder.tower), found.encoder.tower[0].in_features))
        assert all(torch.is_tensor(t) for t in (*E.values(), *u.values()))


def domain_of(encoder, offsets=(), members=None) -> bytes:
    return domains.dump(domains.Domain("sd1", "eps", "cat", "0123", encoder, dict(offsets), {"steps": 3}, members))


def whole_concepts():
    return [concepts.dump(learnt(cover="AAAA")), concepts.dump(learnt(precision="int8")),
            concepts.dump(learnt("sdxl", bias=0.7))]


def whole_domains():
    torch.manual_seed(0)
    ours = Encoder(3, 10, {"clip_l": 5, "clip_g": 7}, {NAME: 4}, hidden=16)
    offsets = {NAME: Offset(torch.randn(3, 4), torch.randn(2, 6))}
    members = Members(torch.randn(10), torch.randn(10, 10), torch.tensor(1.5))
    return [domain_of(ours.eval(), {}, members), domain_of(fold(published.encoder().state_dict()), offsets)]


def led(change):
    """What `judged` calls to change a file that went a new way, or a whole one."""
    def guided(corpus, case):
        r, data = case
        return change(r, r.choice(corpus) if corpus and r.random() < 0.8 else data)
    return guided


KINDS = {
    "concept": (read_concept, whole_concepts, 9000), "domain": (read_domain, whole_domains, 5000),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_read_whole_or_gets_a_sentence(kind, many, tmp_path, tally):
    run, whole, count = KINDS[kind]
    r, whole, n = random.Random(0), whole(), many(count)
    done = judged(run, (file_changed(r, r.choice(whole), r.choice(whole)) for _ in range(n)), tmp_path)
    assert done.total() == n and min(done["read"], done["refused"]) > n / 100
    tally(f"{kind} files, drawn", **done)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_that_is_led_into_our_code_is_read_whole_or_gets_a_sentence(kind, many, tmp_path, tally):
    run, whole, count = KINDS[kind]
    r, whole, n = random.Random(1), whole(), many(count // 2)
    guided = led(lambda r, data: file_changed(r, data, r.choice(whole)))
    done = judged(run, ((r, r.choice(whole)) for _ in range(n)), tmp_path, guided)
    assert done.total() == n and min(done["read"], done["refused"]) >= n // 100  # of few, all may be refused
    tally(f"{kind} files, led", **done)


def test_a_bad_string_in_a_workflow_is_read_whole_or_gets_a_sentence(many, tmp_path, tally):
    r, whole, n = random.Random(2), whole_concepts(), many(3000)

    def cases():
        for _ in range(n):
            data = r.choice(whole)
            if r.random() < 0.5:
                data = file_changed(r, data, r.choice(whole))
            text = base64.b64encode(data).decode()
            yield text_changed(r, text) if r.random() < 0.7 else text

    done = judged(read_text, cases(), tmp_path)
    assert done.total() == n and min(done["read"], done["refused"]) > n / 100
    tally("embedded strings", **done)


# Files of other programs


@pytest.fixture(scope="module")
def states():
    """A .ckpt and a .pt of the other Perfusion programs, before they are saved."""
    from test_importers import Content, ldm, parts

    content = Content()
    content.inverse = content.inverse.half()
    return [ldm(content), parts(content), parts(content, content)]


def foreign_cases(r, n, states, canary):
    whole = [saved(state) for state in states]
    for _ in range(n):
        k = r.randrange(len(states))
        if r.random() < 0.5:
            try:
                yield saved(state_changed(r, states[k]))
            except (RecursionError, RuntimeError, OverflowError, TypeError):  # what torch.save itself cannot save
                yield archive_changed(r, whole[k], canary)
        else:
            yield archive_changed(r, whole[k], canary)


def test_a_bad_file_of_another_program_is_converted_whole_or_gets_a_sentence_and_runs_nothing(
        many, states, tmp_path, tally):
    r, n, canary = random.Random(3), many(3000), tmp_path / "canary" / "sang"
    canary.parent.mkdir()
    path = tmp_path / "read" / "mimi.pt"
    path.parent.mkdir()

    def run(data):
        path.write_bytes(data)
        good_concept(convert(path, "<teddy>", "teddy")[0])

    done = judged(run, foreign_cases(r, n, states, str(canary)), path.parent)
    assert done.total() == n and done["refused"] > n / 2 and done["read"] > n / 100
    assert not list(canary.parent.iterdir())
    tally("files of other Perfusion programs", **done)


def test_the_orders_that_the_bad_files_give_would_leave_a_mark(tmp_path):
    """Else nothing was shown by the mark's absence."""
    import io
    import pickle
    sang = 0
    for order in commands(str(tmp_path / "sang")):
        try:
            pickle.load(io.BytesIO(b"\x80\x04" + order + b"."))
        except Exception:  # some need a module that is not here
            continue
        sang += (tmp_path / "sang").exists()
        (tmp_path / "sang").unlink(missing_ok=True)
    assert sang >= 4


def test_a_bad_folder_of_the_public_e4t_program_is_imported_whole_or_gets_a_sentence(many, tmp_path, tally):
    r, n, folder = random.Random(4), many(600), tmp_path / "read" / "faces"
    encoder, offsets = published.encoder().state_dict(), published.offsets()
    whole = {"config.json": json.dumps(published.CONFIG).encode(), "encoder.pt": saved(dict(encoder)),
             "weight_offsets.pt": saved(dict(offsets))}
    canary = tmp_path / "sang"
    folder.mkdir(parents=True)

    def cases():
        for _ in range(n):
            name = r.choice(["config.json", "encoder.pt", "encoder.pt", "weight_offsets.pt"])
            if name == "config.json":
                config = published.CONFIG | {r.choice([*published.CONFIG, "pretrained_args"]): hostile(r)}
                data = json.dumps(config).encode()
                data = data[: r.randrange(len(data))] if r.random() < 0.2 else data
            elif r.random() < 0.5:
                state = dict(encoder if name == "encoder.pt" else offsets)
                key = r.choice([*state, "new"])
                tensor = state.get(key)
                change = r.choice(["gone", "strange", "shape", "nan"])
                if change == "gone" or tensor is None:
                    state.pop(key, None)
                elif change == "shape":
                    state[key] = r.choice([tensor[None], tensor.flatten(), torch.zeros(2**40, 0), torch.zeros(0, 2**40),
                                           tensor[:0], torch.zeros(2**31, 0, 1), tensor.flatten()[None]])
                elif change == "nan":
                    state[key] = tensor * float("nan")
                else:
                    state[key] = r.choice([hostile(r), bomb(), torch.ones(1).expand(2**40), tensor.long()])
                data = saved(state)
            else:
                data = archive_changed(r, whole[name], str(canary))
            yield json.dumps(name).encode() + b"\n" + data

    def run(case):
        name, _, data = case.partition(b"\n")
        for other, held in (whole | {json.loads(name): data}).items():
            (folder / other).write_bytes(held)
        assert domains.dump(pretrained(folder)[0])

    done = judged(run, cases(), folder.parent)
    assert done.total() == n and done["refused"] > n / 4
    assert not canary.exists()
    tally("folders of the public E4T program", **done)


def test_the_good_files_are_read(states, tmp_path):
    """Else all would be refused for another reason."""
    for data in whole_concepts():
        read_concept(data)
        read_text(base64.b64encode(data).decode())
    for data in whole_domains():
        read_domain(data)
    for k, state in enumerate(states):
        path = tmp_path / f"{k}.pt"
        path.write_bytes(saved(state))
        good_concept(convert(path, "<teddy>", "teddy")[0])
        assert zipfile.is_zipfile(path) and entries_of(path.read_bytes())
