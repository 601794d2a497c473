"""A real browser before a real server, in both of the host's renderers. `make test-e2e` runs what is here."""

import base64
import time

import pytest

from pages import begin, browser
from served import as_prompt, serving


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        try:
            found = browser(play)
        except ValueError as error:
            pytest.exit(f"!!! NO BROWSER: NOTHING THAT AN ARTIST SEES WAS TESTED !!! {error}", 1)
        yield found
        found.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server on the demo model, with the concept mimi.safetensors in its list: two steps, for its picture's sake."""
    with serving(tmp_path_factory.mktemp("server")) as talk:
        graph = demo(talk)
        graph["12"]["inputs"]["cover"] = ["2", 0]
        status, _, errors = talk.run(graph)
        assert status == "success", errors
        yield talk


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """A server whose models folder is empty."""
    with serving(tmp_path_factory.mktemp("elsewhere")) as talk:
        yield talk


def demo(server):
    """The demo workflow as a prompt, small enough for a test."""
    graph = as_prompt(server.call("/userdata/workflows%2Fcreature_demo.json"), server.call("/object_info"))
    graph["3"]["inputs"] |= {"steps": 2, "batch": 1}
    graph["8"]["inputs"]["batch_size"] = 1
    graph["9"]["inputs"]["steps"] = 2
    return graph


@pytest.fixture(params=[False, True], ids=["canvas", "nodes2"])
def at(request, chromium):
    """Opens a server's page with nothing on the canvas, a script of the test's ahead of all others. What the page
    complains of, from this pack, fails the test."""
    complaints, contexts = [], []

    def open_page(server, script=""):
        context = chromium.new_context(viewport={"width": 1400, "height": 900})
        contexts.append(context)
        context.add_init_script(script)
        server.call("/api/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": request.param})
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning")
                and "perfusion" in f"{message.text} {message.location.get('url')}".lower()
                and not (message.location.get("url") or "").startswith("https:") else None)  # the host's own registry
        begin(page, server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def choose(server):
    """Sets settings of the server, and puts them back."""
    before = {"Perfusion.QuickTune.PreviewEvery": 10, "Perfusion.Concepts.EmbedByDefault": False, "Comfy.Locale": "en",
              "Comfy.ColorPalette": "dark"}
    yield lambda settings: server.call("/api/settings", settings)
    server.call("/api/settings", before)


@pytest.fixture
def put():
    """Puts a node of a kind on a page's canvas."""
    def one(page, kind, x=200, y=150):
        page.evaluate("""([kind, x, y]) => {
            const node = LiteGraph.createNode(kind); node.pos = [x, y]; app.graph.add(node) }""", [kind, x, y])

    return one


@pytest.fixture
def ended():
    """Waits for the end of the next run of a server after so many, and gives its entry of the history."""
    def one(server, before):
        for _ in range(600):
            if len(runs := server.call("/history")) > before:
                return list(runs.values())[-1]
            time.sleep(0.2)
        raise AssertionError("the run did not end")

    return one


@pytest.fixture
def drop():
    """Drops a file on the middle of a page's canvas."""
    def one(page, name, data, kind="", shift=False):
        page.evaluate("""([name, letters, type, shiftKey]) => {
            const bytes = Uint8Array.from(atob(letters), (letter) => letter.charCodeAt(0))
            const dataTransfer = new DataTransfer()
            dataTransfer.items.add(new File([bytes], name, { type }))
            const at = { clientX: 600, clientY: 400, bubbles: true, cancelable: true }
            app.canvas.canvas.dispatchEvent(new DragEvent("drop", { ...at, shiftKey, dataTransfer })) }""",
                      [name, base64.b64encode(data).decode(), kind, shift])

    return one
