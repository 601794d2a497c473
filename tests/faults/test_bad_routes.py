"""What a browser, or anybody else, may ask of the server: thousands of names and bodies over real HTTP.

Each gets an answer of ours, and no file is read or written but in the folders of the pack.
"""

import asyncio
import base64
import json
import os
import random
import string
from urllib.parse import quote, quote_from_bytes

import pytest

from perfusion.core.concept import dump

from concepts import learnt
from judged import LONGEST, judged
from mutants import TEXTS, file_changed

pytestmark = pytest.mark.host
PARTS = ["..", ".", "", "/", "\\", "\0", "%2e%2e", "..%2f", "%00", "C:", "con", "nul.txt", "a:b", "~", "$HOME", "x",
         "é", "猫", "\u202e", "\ud800", "\udcff", " ", "\n", "\r\nX: y", "?", "#", "&name=y", ";", "|", "*", "carried",
         "secret", ".safetensors", "out", "domains", "file://", "x" * 250, "猫" * 90, "x" * 5000, "etc/passwd",
         "concepts"]


def a_name(r) -> str:
    if r.random() < 0.15:
        return r.choice(TEXTS)[:8000]
    if r.random() < 0.1:
        return "".join(chr(r.randrange(1, 0x3000)) for _ in range(r.randrange(1, 40)))
    return r.choice(["", "/", "\\", "//"]).join(r.choice(PARTS) for _ in range(r.randrange(1, 7)))


def asked(r, whole: bytes) -> dict:
    """A request: its method, what follows the ?, and its body."""
    name = a_name(r)
    known = r.random()
    if known < 0.2:
        name = r.choice(["carried.safetensors", "out/secret.safetensors", "../secret.safetensors", "link.safetensors",
                         "gone.safetensors", "folder.safetensors", "pipe.safetensors"])
    raw = quote_from_bytes(name.encode("utf-8", "surrogatepass"), safe="")
    if r.random() < 0.2:
        plain = "".join(c for c in name if c.isascii() and c.isprintable() and c not in " #")
        raw = r.choice([quote(raw), plain, "%ff%fe", "%", "%zz", raw + "&name=carried.safetensors"])
    query = r.choice(["name=", "name=", "name=", "name=", "", "name[]=", "NAME="]) + raw
    body = whole if r.random() < 0.5 else file_changed(r, whole, whole)
    if r.random() < 0.1:
        text = "".join(r.choices(string.printable, k=99))
        body = r.choice([b"", r.randbytes(100), b"{}", bytes(2**24 + 1), text.encode()])
    post = r.random() < 0.5
    body = base64.b64encode(body).decode() if post else ""
    return {"method": "POST" if post else "GET", "query": query, "body": body}


@pytest.fixture
def place(pack):
    """The pack's folders, with a concept, and with what a name might lead astray to."""
    from perfusion.nodes import folders

    base = folders.models().parent.parent
    saved, secret = folders.save(learnt(), "carried"), base / "secret.safetensors"
    secret.write_bytes(dump(learnt(word="<secret>")))
    (saved.parent / "gone.safetensors").symlink_to(base / "nothing")
    (saved.parent / "folder.safetensors").mkdir()
    os.mkfifo(saved.parent / "pipe.safetensors")
    return base, saved.parent, secret


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.faults)], ids=["share", "all"])
def test_no_request_reads_or_writes_outside_of_the_folders_or_gets_anything_but_an_answer_of_ours(place, count, tally):
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer
    from yarl import URL

    from perfusion.nodes import folders, routes

    base, saved, secret = place
    r, whole, before, open_to = random.Random(5), dump(learnt(superclass="dog")), secret.read_bytes(), {}
    loop = asyncio.new_event_loop()

    async def begin():
        table, app = web.RouteTableDef(), web.Application(client_max_size=2**30)
        routes.register(table)
        app.add_routes(table)
        client = TestClient(TestServer(app, host="127.0.0.1"))
        await client.start_server()
        return client

    async def one(method, query, body):
        client = open_to["client"]
        url = URL(f"{client.make_url('/perfusion/concept')}?{query}", encoded=True)
        async with client.session.request(method, url, data=base64.b64decode(body) if body else None) as answer:
            return answer.status, await answer.read(), answer.content_type

    def run(case):
        if not open_to:
            open_to["client"] = loop.run_until_complete(begin())
        status, text, kind = loop.run_until_complete(one(**json.loads(case)))
        assert status == 200 or 400 <= status < 500, (status, text[:200])
        assert b"Traceback" not in text
        if status != 200:
            return "refused"
        assert kind == "application/json"
        answer = json.loads(text)
        for path in saved.iterdir():
            assert path.suffix == ".safetensors" and not path.name.startswith("."), path.name
        assert secret.read_bytes() == before and sorted(p.name for p in base.iterdir()) == there
        if "error" in answer:
            said = answer["error"]
            assert said.endswith(".") and 20 < len(said) < LONGEST, said
            return "refused"
        assert answer["word"] != "<secret>"
        if json.loads(case)["method"] == "POST":
            assert (saved / answer["name"]).is_file() and answer["name"] in folders.names()
            (saved / answer["name"]).unlink() if answer["name"] != "carried.safetensors" else None

    there = sorted(p.name for p in base.iterdir())
    done = judged(run, (json.dumps(asked(r, whole)) for _ in range(count)), base)
    loop.close()
    assert done.total() == count and min(done["read"], done["refused"]) > count / 20
    tally("requests", **done)
