"""What the browser may ask of the server, over real HTTP: nothing outside of the concepts' folders, and sentences."""

import asyncio
import base64
import hashlib

import pytest

from concepts import learnt

pytestmark = pytest.mark.host


@pytest.fixture
def ask(pack):
    """Sends one request to the pack's routes, and gives the answer."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    from perfusion.nodes import routes

    async def one(method, body, **query):
        table, app = web.RouteTableDef(), web.Application(client_max_size=2**30)
        routes.register(table)
        app.add_routes(table)
        async with TestClient(TestServer(app)) as client:
            answer = await client.request(method, "/perfusion/concept", params=query, data=body)
            assert answer.status == 200
            return await answer.json()

    return lambda method="GET", body=None, **query: asyncio.run(one(method, body, **query))


@pytest.fixture
def saved(pack):
    from perfusion.nodes import folders

    return folders.save(learnt(cover=base64.b64encode(b"picture").decode()), "carried")


def test_a_listed_concept_comes_with_its_hash_and_as_a_workflow_carries_it(ask, saved):
    from perfusion.core.concept import load, unpack

    facts = ask(name="carried.safetensors")
    assert (facts["word"], facts["superclass"]) == ("<mimi>", "cat")
    assert facts["sha256"] == hashlib.sha256(saved.read_bytes()).hexdigest()
    there, carried = load(saved, facts["sha256"]), unpack(facts["embedded"], facts["embedded_sha256"])
    assert carried.cover == "" and there.cover
    assert carried.target_input.equal(there.target_input) and carried.training == there.training


@pytest.mark.parametrize("name", ["", "gone.safetensors", "../carried.safetensors", "/etc/passwd", "x" * 400, "a\0b"])
def test_a_name_that_is_not_in_the_list_gets_a_sentence(ask, saved, name):
    answer = ask(name=name)
    assert "is not in the list" in answer["error"]


@pytest.mark.parametrize("name", ["dropped", "dropped.safetensors", "../../dropped.safetensors", "/tmp/dropped"])
def test_what_the_browser_sends_lands_in_the_list_under_no_other_folder_whatever_its_name(ask, name):
    from perfusion.core.concept import dump
    from perfusion.nodes import folders

    data = dump(learnt(superclass="dog"))
    answer = ask("POST", data, name=name)
    assert answer["name"] == "dropped.safetensors" and answer["name"] in folders.names()
    assert folders.find(answer["name"]).parent == folders.saved()
    assert answer["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("body, sentence", [(b"", "not a whole"), (b"x" * 100, "not a whole"),
                                            (bytes(2**24 + 1), "less than one")])
def test_what_is_no_concept_is_not_written(ask, body, sentence):
    from perfusion.nodes import folders

    before = folders.names()
    answer = ask("POST", body, name="bad.safetensors")
    assert sentence in answer["error"] and folders.names() == before


def test_a_name_that_no_file_can_have_gets_a_sentence(ask):
    from perfusion.core.concept import dump

    answer = ask("POST", dump(learnt()), name="x" * 400)
    assert "Give a shorter one" in answer["error"]


# Found by tests/faults


@pytest.mark.parametrize("name, kept", [
    ("a\0b", "a_b"), ("..", "concept"), ("..\\..\\x", "x"), ("C:\\x", "x"), ("a:b", "a_b"), (".hidden", "hidden"),
    ("\udcff", "_"), ("line\nbreak", "line_break"), ("nul", "_nul"), ("con.txt", "_con.txt"), ("猫", "猫"), ("a/", "a"),
])
def test_a_name_becomes_one_that_every_system_can_keep(pack, name, kept):
    from perfusion.core.concept import dump
    from perfusion.nodes import folders

    path = folders.free(name, dump(learnt()))
    assert path == folders.saved() / f"{kept}.safetensors"


def test_a_file_that_cannot_be_read_gets_a_sentence(ask, saved):
    from perfusion.nodes import folders

    there = saved.with_name("loop.safetensors")
    there.symlink_to(there)
    assert "loop.safetensors" in folders.names()
    assert ask(name="loop.safetensors")["error"].endswith(".")
    there.unlink()


def test_a_large_file_of_the_same_name_is_not_read_to_find_a_free_one(pack):
    from perfusion.core.concept import dump
    from perfusion.nodes import folders

    path = folders.saved() / "large.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse; read, it would not fit in memory
    assert folders.free("large", dump(learnt())).name == "large-2.safetensors"
    path.unlink()
