"""The example workflows and the box in a real browser: they open whole and queue what they say, and the box works."""

import json
import re
import shutil

import pytest
from PIL import Image

from served import as_prompt
from test_server import node
from test_workflows import CHECKPOINT, FROZEN, NAMES, ROOT, read, workflow

pytestmark = [pytest.mark.host, pytest.mark.e2e]
BOX = "Personalize from one photo"
BOXES = {path.read_text(encoding="utf-8"): path.parent.parent.name  # of every version, those that are alike once
         for path in [ROOT / "subgraphs" / f"{BOX}.json", *sorted(FROZEN.glob(f"*/subgraphs/{BOX}.json"))]}
MISSING = re.compile(r"is missing( a required.*)?$|Missing (Nodes|Models|Inputs|Node Packs)|errors? found")
QUEUED = """async () => Object.fromEntries(Object.entries((await app.graphToPrompt()).output)
               .map(([id, { class_type, inputs }]) => [id, { class_type, inputs }]))"""


@pytest.fixture
def stocked(server):
    """The server with files of all names that the workflows give."""
    made = {"models/checkpoints": (CHECKPOINT, None), "output/perfusion": ("tom.safetensors", "mimi.safetensors"),
            "input": ("example.png", ROOT / "demo" / "pictures" / "mimi.png")}
    for place, (name, source) in made.items():
        (server.base / place / name).touch()
        if source:
            shutil.copy(server.base / place / source, server.base / place / name)
    yield server
    for place, (name, _) in made.items():
        (server.base / place / name).unlink()


def open_on(page, graph):
    """Open a workflow, and give what the page queues of it, without the hash that a concept's file adds."""
    page.evaluate("(graph) => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(700)
    queued = page.evaluate(QUEUED)
    for box in queued.values():
        if "sha256" in box["inputs"]:
            box["inputs"]["sha256"] = ""
    return queued


def holds(queued, boxes):
    """Whether each box is queued with all its values."""
    return all(queued[key]["class_type"] == box["class_type"] and box["inputs"].items() <= queued[key]["inputs"].items()
               for key, box in boxes.items())


def test_every_workflow_opens_with_nothing_missing_and_queues_what_it_says(at, stocked):
    page, info = at(stocked), stocked.call("/object_info")
    for name in NAMES:
        graph = workflow(name)
        queued = open_on(page, graph)
        assert queued.keys() == as_prompt(graph, info).keys() and holds(queued, as_prompt(graph, info)), name
        kinds = page.evaluate("() => app.graph.nodes.map((node) => [node.type, LiteGraph.registered_node_types])"
                              ".filter(([kind, known]) => !known[kind]).map(([kind]) => kind)")
        assert kinds == [] and page.get_by_text(MISSING).all_inner_texts() == [], name


def test_every_frozen_workflow_opens_and_queues_what_it_queued_then(at, stocked):
    page = at(stocked)
    for path in sorted(FROZEN.glob("*/*.json")):
        assert holds(open_on(page, read(path)), read(path.parent / "queued" / path.name)), path


def test_a_node_is_as_large_as_the_workflow_says(at, stocked):
    """So that none covers another: the screen makes a node larger where its content needs more."""
    page = at(stocked)
    for name in NAMES:
        open_on(page, workflow(name))
        sizes = {n["id"]: n["size"] for n in page.evaluate("() => app.graph.serialize()")["nodes"]}
        for n in workflow(name)["nodes"]:
            (wide, high), (w, h) = sizes[n["id"]], n["size"]
            assert wide <= w + 1 and high <= h + 20, (name, n["type"], sizes[n["id"]])


def test_a_checkpoint_that_is_not_there_is_offered_from_its_address(at, server):
    page = at(server)
    open_on(page, workflow("tune_from_one_photo"))
    page.get_by_text(MISSING).first.wait_for()
    page.get_by_role("button", name="View details").click()
    page.get_by_text("Missing Models", exact=True).wait_for()
    page.get_by_role("button", name="Download all").wait_for()  # is there for a model of a known address alone
    page.get_by_role("button", name=CHECKPOINT).first.wait_for()


def test_the_host_lists_the_box_and_search_puts_it_down_whole(at, server):
    assert BOX in [entry["name"] for entry in server.call("/global_subgraphs").values()]
    page = at(server)
    page.mouse.dblclick(700, 300)
    page.wait_for_function("() => document.activeElement.tagName === 'INPUT'")  # the search has opened
    page.keyboard.type(BOX)
    page.get_by_text("Blueprint", exact=True).first.wait_for()
    page.keyboard.press("Enter")
    page.wait_for_function("() => app.graph.nodes.length === 1")
    page.mouse.click(300, 300)
    box = page.evaluate("""() => { const [node] = app.graph.nodes
        return { title: node.title, inside: node.subgraph.nodes.map((n) => n.type),
                 widgets: node.widgets.map((w) => [w.name, w.value]) } }""")
    assert box["title"] == BOX
    assert box["inside"] == ["PerfusionQuickTune", "PerfusionGateStrength", "PerfusionApplyConcept", "MarkdownNote"]
    assert box["widgets"] == [["superclass", "cat"], ["word", "<mimi>"], ["steps", 0], ["resolution", 512],
                              ["strength", 0.75]]


@pytest.mark.parametrize("box", BOXES, ids=BOXES.get)
def test_the_box_makes_the_picture_that_its_three_nodes_make(at, server, box):
    values = {"superclass": "creature", "word": "<mimi>", "steps": 2, "resolution": 128, "strength": 0.7}
    page = at(server)
    page.evaluate("(graph) => app.loadGraphData(graph)", json.loads(box))
    page.evaluate("""(values) => {
        const [box] = app.graph.nodes
        const set = (node, values) => node.widgets?.forEach((w) => { if (w.name in values) w.value = values[w.name] })
        const add = (kind, values = {}) => {
          const node = LiteGraph.createNode(kind); app.graph.add(node); set(node, values); return node }
        set(box, values)
        const demo = add("PerfusionDemoModel"), photo = add("PerfusionDemoPicture")
        const yes = add("CLIPTextEncode", { text: "a <mimi> in the snow" }), no = add("CLIPTextEncode")
        const empty = add("EmptyLatentImage", { width: 128, height: 128 }), decode = add("VAEDecode")
        const k = add("KSampler", { seed: 3, steps: 2 }), save = add("SaveImage", { filename_prefix: "box" })
        for (const [from, slot, to, at] of [[demo, 0, box, 0], [demo, 1, box, 1], [demo, 2, box, 2], [photo, 0, box, 3],
            [box, 1, yes, 0], [box, 1, no, 0], [box, 0, k, 0], [yes, 0, k, 1], [no, 0, k, 2], [empty, 0, k, 3],
            [k, 0, decode, 0], [demo, 2, decode, 1], [decode, 0, save, 0]]) from.connect(slot, to, at) }""", values)
    queued = page.evaluate(QUEUED)
    page.evaluate("""() => new Promise((done) => {
        app.api.addEventListener("execution_success", done, { once: true }); app.queuePrompt(0, 1) })""")
    (made,) = (server.base / "output").glob("box_*.png")

    strength = values.pop("strength")
    by_hand = {
        "1": node("PerfusionDemoModel"), "2": node("PerfusionDemoPicture", picture="mimi"),
        "3": node("PerfusionQuickTune", model=["1", 0], clip=["1", 1], vae=["1", 2], image=["2", 0], seed=0, batch=4,
                  mirror=False, **values),
        "4": node("PerfusionGateStrength", concept=["3", 0], strength=strength, bias_mode="slider", bias=0.7,
                  temperature=0.15),
        "5": node("PerfusionApplyConcept", model=["1", 0], clip=["1", 1], concept=["4", 0], edit_negative=False),
        "6": node("CLIPTextEncode", clip=["5", 1], text="a <mimi> in the snow"),
        "7": node("CLIPTextEncode", clip=["5", 1], text=""),
        "8": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "9": node("KSampler", model=["5", 0], positive=["6", 0], negative=["7", 0], latent_image=["8", 0],
                  **{key: value for key, value in next(box["inputs"] for box in queued.values()
                                                       if box["class_type"] == "KSampler").items()
                     if not isinstance(value, list)}),
        "10": node("VAEDecode", samples=["9", 0], vae=["1", 2]),
        "11": node("SaveImage", images=["10", 0], filename_prefix="hand"),
    }
    status, outputs, errors = server.run(by_hand)
    assert status == "success", errors
    by_hand = Image.open(server.base / "output" / outputs["11"]["images"][0]["filename"])
    assert by_hand.tobytes() == Image.open(made).tobytes()
    made.unlink()
