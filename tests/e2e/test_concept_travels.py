"""The concept travels with the workflow, a file dropped on the canvas becomes a node, and nothing is swapped."""

import hashlib
import itertools
import json
import re
import urllib.request

import pytest
from PIL import Image

from pages import press

pytestmark = [pytest.mark.host, pytest.mark.e2e]
SEEDS = itertools.count(1)  # the host makes no picture twice
VALUES = "() => Object.fromEntries(app.graph.nodes.at(-1).widgets.map((widget) => [widget.name, widget.value]))"


def values(page):
    return page.evaluate(VALUES)


def file_of(server):
    return server.base / "output" / "perfusion" / "mimi.safetensors"


def workflow_of(page):
    """A workflow with the concept of the page's Load node, as the host saves it; its picture is made from that."""
    page.evaluate("""(seed) => {
        const [load] = app.graph.nodes, made = {}
        for (const [kind, x, y] of [["PerfusionDemoModel", 100, 500], ["PerfusionApplyConcept", 500, 100],
                                    ["CLIPTextEncode", 800, 100], ["CLIPTextEncode", 800, 350],
                                    ["EmptyLatentImage", 800, 600], ["KSampler", 1200, 100],
                                    ["VAEDecode", 1500, 100], ["SaveImage", 1700, 100]]) {
          const node = LiteGraph.createNode(kind); node.pos = [x, y]; app.graph.add(node)
          made[kind] = [...(made[kind] ?? []), node]
        }
        const { PerfusionDemoModel: [demo], PerfusionApplyConcept: [apply], CLIPTextEncode: [yes, no], KSampler: [k],
                EmptyLatentImage: [empty], VAEDecode: [decode], SaveImage: [save] } = made
        const set = (node, values) => node.widgets.forEach((w) => { if (w.name in values) w.value = values[w.name] })
        set(yes, { text: "a <mimi> in the snow" }); set(no, { text: "" })
        set(empty, { width: 128, height: 128 }); set(k, { steps: 2, seed })
        for (const [from, slot, to, at] of [[demo, 0, apply, 0], [demo, 1, apply, 1], [load, 0, apply, 2],
            [apply, 1, yes, 0], [apply, 1, no, 0], [apply, 0, k, 0], [yes, 0, k, 1], [no, 0, k, 2], [empty, 0, k, 3],
            [k, 0, decode, 0], [demo, 2, decode, 1], [decode, 0, save, 0]]) from.connect(slot, to, at) }""",
                  next(SEEDS))


def queue(page, server):
    """The picture's file of one run from the page."""
    folder = server.base / "output"
    before = set(folder.glob("*.png"))
    page.evaluate("""() => new Promise((done) => {
        app.api.addEventListener("execution_success", done, { once: true }); app.queuePrompt(0, 1) })""")
    (made,) = set(folder.glob("*.png")) - before
    return made


def test_a_workflow_that_names_a_file_holds_its_hash_and_shows_what_it_is(at, put, server):
    page = at(server)
    put(page, "PerfusionLoadConcept")
    page.get_by_text("<mimi>, a creature").wait_for()
    assert values(page)["sha256"] == hashlib.sha256(file_of(server).read_bytes()).hexdigest()
    assert page.get_by_role("img", name="cover").is_visible()
    assert page.get_by_text("sha256").count() == 0  # what is not for hands is not shown


def test_an_embedded_concept_makes_the_same_picture_where_no_file_is(at, put, drop, server, elsewhere):
    page = at(server)
    put(page, "PerfusionLoadConcept")
    press(page, "Embed in workflow")
    page.get_by_text("likeness").wait_for()
    page.get_by_role("button", name="Confirm").click()
    page.get_by_text("embedded: <mimi>").wait_for()
    workflow_of(page)
    made = queue(page, server)

    other = at(elsewhere)
    drop(other, "shared.png", made.read_bytes(), "image/png")
    other.get_by_text("embedded: <mimi>").wait_for()
    other.wait_for_timeout(1000)
    assert other.get_by_text(re.compile("is missing|Missing Models")).count() == 0
    again = queue(other, elsewhere)
    assert Image.open(again).tobytes() == Image.open(made).tobytes()

    press(other, "Save to my concepts")
    other.get_by_text("Saved as").wait_for()
    assert (elsewhere.base / "output" / "perfusion" / "mimi.safetensors").exists()
    press(other, "Take out of workflow")
    other.get_by_role("button", name="Embed in workflow").wait_for()
    there = next(node for node in other.evaluate("() => app.graph.serialize().nodes")
                 if node["type"] == "PerfusionLoadConcept")["widgets_values"]
    assert there[:2] == ["mimi.safetensors", ""] and len(there) == 3
    (elsewhere.base / "output" / "perfusion" / "mimi.safetensors").unlink()


def test_shift_takes_the_concept_out_of_a_picture_and_leaves_the_graph(at, put, drop, server):
    page = at(server)
    put(page, "PerfusionLoadConcept")
    press(page, "Embed in workflow")
    page.get_by_role("button", name="Confirm").click()
    page.get_by_text("embedded: <mimi>").wait_for()
    workflow_of(page)
    made = queue(page, server).read_bytes()
    page.evaluate("() => app.graph.clear()")
    put(page, "EmptyLatentImage")
    drop(page, "shared.png", made, "image/png", shift=True)
    page.get_by_text("embedded: <mimi>").wait_for()
    assert page.evaluate("() => app.graph.nodes.map((node) => node.type)") == ["EmptyLatentImage",
                                                                              "PerfusionLoadConcept"]


def test_another_file_of_that_name_is_refused_until_it_is_accepted(at, put, server):
    page = at(server)
    put(page, "PerfusionLoadConcept")
    page.get_by_text("<mimi>, a creature").wait_for()
    workflow = page.evaluate("() => app.graph.serialize()")
    right = workflow["nodes"][0]["widgets_values"][2]
    workflow["nodes"][0]["widgets_values"][2] = "0" * 64
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    page.get_by_text("another mimi.safetensors").wait_for()
    assert values(page)["sha256"] == "0" * 64
    press(page, "Use this file")
    page.get_by_text("<mimi>, a creature").wait_for()
    assert values(page)["sha256"] == right


def test_a_dropped_file_is_put_among_the_concepts_and_becomes_a_node(at, drop, server):
    page = at(server)
    data = file_of(server).read_bytes()
    drop(page, "friend.safetensors", data)
    page.get_by_text("<mimi>, a creature").wait_for()
    assert values(page) | {"travels": ""} == {"concept_name": "friend.safetensors", "embedded": "", "travels": "",
                                              "sha256": hashlib.sha256(data).hexdigest()}
    (server.base / "output" / "perfusion" / "friend.safetensors").unlink()


def test_a_dropped_file_that_only_looks_like_a_concept_gets_a_sentence(at, drop, server):
    page = at(server)
    drop(page, "friend.safetensors", file_of(server).read_bytes()[:3000])
    page.get_by_text("is not a whole .safetensors file").wait_for()
    assert page.evaluate("() => app.graph.nodes.length") == 0


def test_covers_and_facts_are_in_the_hosts_model_library(server):
    folders = [folder["name"] for folder in server.call("/api/experiment/models")]
    assert "perfusion" in folders
    listed = server.call("/api/experiment/models/perfusion")
    place = next(f["pathIndex"] for f in listed if f["name"] == "mimi.safetensors")
    facts = server.call("/view_metadata/perfusion?filename=mimi.safetensors")
    assert facts["modelspec.trigger_phrase"] == "<mimi>" and facts["modelspec.usage_hint"] == "Strength 0.75"
    assert "creature" in facts["modelspec.description"] and len(json.loads(facts["ssmd_cover_images"])) == 1
    url = f"{server.url}/api/experiment/models/preview/perfusion/{place}/mimi.webp"
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["Content-Type"] == "image/webp"
