"""The example workflows: what they are made of, how they are laid out, and that they make pictures on a real server.

tests/frozen holds the workflows and boxes of every version as they were, a folder for each, and in its `queued` what
the screen made of them then. A file there is never edited, only added, by `python -m bench workflows`: an artist may
have it. 0.1.0-load-image has those of the demo as they were before Load Demo Picture.
"""

import itertools
import json
import shutil
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from served import as_prompt, serving
from test_server import HERE, REGISTER

pytestmark = pytest.mark.host
ROOT = HERE.parent
FROZEN = HERE / "frozen"
FOLDER = ROOT / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
PICTURES = ROOT / "demo" / "pictures"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
SMALL = {"PerfusionQuickTune": {"steps": 2, "batch": 1, "resolution": 128}, "KSampler": {"steps": 2},
         "PerfusionTrainDomain": {"steps": 2}}

every_workflow = pytest.mark.parametrize("name", NAMES)
every_frozen_one = pytest.mark.parametrize("path", sorted(FROZEN.glob("*/*.json")),
                                           ids=lambda path: f"{path.parent.name}/{path.stem}")


def read(path):
    """A file's JSON."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def workflow(name):
    return read(FOLDER / f"{name}.json")


def open_on(info, workflow):
    """What the screen would queue of it. The test is skipped where this version of the host lacks one of its nodes."""
    for node in workflow["nodes"]:
        if node["type"] not in info and node["properties"].get("cnr_id") == "comfy-core":
            pytest.skip(f"this version of the host has no {node['type']}")
    return as_prompt(workflow, info)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose SD1.5 checkpoint is a tiny random one, and whose pictures are the demo's."""
    import checkpoints

    base = tmp_path_factory.mktemp("server")
    for place in "custom_nodes/tiny", "models/checkpoints", "models/perfusion":
        (base / place).mkdir(parents=True)
    (base / "custom_nodes" / "tiny" / "__init__.py").write_text(REGISTER.format(here=str(HERE)))
    checkpoints.register()
    checkpoints.save_tiny("sd1", base / "models" / "checkpoints" / CHECKPOINT)
    checkpoints.unregister()
    captions = (ROOT / "core" / "captions.txt").read_text(encoding="utf-8").splitlines()
    (base / "models" / "perfusion" / "captions.txt").write_text("\n".join(captions[:256]), encoding="utf-8")
    shutil.copytree(PICTURES, base / "input")  # of frozen workflows, the ones name a picture there,
    shutil.copytree(PICTURES, base / "input" / "creatures")  # the other one this folder
    shutil.copy(PICTURES / "mimi.png", base / "input" / "example.png")
    with serving(base) as talk:
        yield talk


@pytest.fixture(scope="module")
def info(server):
    return server.call("/object_info")


@pytest.fixture(scope="module")
def made(server, info):
    """The pictures that a workflow makes with few steps. Each is run once, whichever test asks."""
    runs = {}

    def run(workflow):
        key = json.dumps(workflow)
        if key not in runs:
            graph = open_on(info, workflow)
            for box in graph.values():
                box["inputs"] |= SMALL.get(box["class_type"], {})
                if box["class_type"] == "EmptyLatentImage":
                    box["inputs"]["batch_size"] = 1
                if box["class_type"] in ("PreviewImage", "SaveImage"):
                    box["class_type"] = "SaveImage"  # anew for each run: v0.8.0 says nothing of what it kept of another
                    box["inputs"]["filename_prefix"] = f"run-{len(runs)}"
            status, outputs, errors = server.run(graph)
            assert status == "success", errors
            images = [image for key, box in graph.items() if box["class_type"] == "SaveImage"
                      for image in outputs[key]["images"]]
            runs[key] = [Image.open(server.base / "output" / image["filename"]).convert("RGB") for image in images]
        return runs[key]

    return run


@every_workflow
def test_the_host_lists_a_workflow_with_a_small_picture_of_its_name(server, name):
    assert name in server.call("/api/workflow_templates")["perfusion-concepts"]
    assert f"{name}.json" in server.call("/userdata?dir=workflows")  # of a server that `make comfy` starts
    with urllib.request.urlopen(f"{server.url}/api/workflow_templates/perfusion-concepts/{name}.jpg") as answer:
        data = answer.read()
    assert data[:3] == b"\xff\xd8\xff" and len(data) < 60_000


@every_workflow
def test_a_workflow_has_the_hosts_nodes_and_ours_alone_and_each_says_whose_it_is(info, name):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    graph = workflow(name)
    open_on(info, graph)
    for node in graph["nodes"]:
        if node["type"] == "MarkdownNote":  # is the screen's own
            continue
        ours, properties = node["type"].startswith("Perfusion"), node["properties"]
        module = info[node["type"]]["python_module"]
        assert module == "custom_nodes.perfusion-concepts" if ours else module.partition(".")[0] in ("nodes",
                                                                                                     "comfy_extras")
        pack = properties["cnr_id"]
        assert f'\nname = "{pack}"\n' in project if ours else pack == "comfy-core"
        assert properties["ver"] and properties["Node name for S&R"] == node["type"]


@every_workflow
def test_every_link_is_there_at_both_ends_and_joins_sockets_of_one_type(info, name):
    graph = workflow(name)
    open_on(info, graph)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for number, source, out, target, into, of in graph["links"]:
        leaving, entering = nodes[source]["outputs"][out], nodes[target]["inputs"][into]
        assert number in leaving["links"] and entering["link"] == number
        known = info[nodes[target]["type"]]["input"]
        assert of == leaving["type"] == entering["type"] == info[nodes[source]["type"]]["output"][out]
        assert of == {**known["required"], **known.get("optional", {})}[entering["name"]][0]
    ends = [end for node in graph["nodes"] for socket in node["outputs"] for end in socket["links"] or ()]
    assert sorted(ends) == sorted(link[0] for link in graph["links"])


@every_workflow
def test_every_widget_has_a_value_that_its_node_takes(info, name):
    for box in open_on(info, workflow(name)).values():
        known = info[box["class_type"]]["input"]
        for key, (of, *options) in {**known["required"], **known.get("optional", {})}.items():
            value, options = box["inputs"].get(key), options[0] if options else {}
            if isinstance(value, list) or value is None:
                continue
            if of in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], key
            elif isinstance(of, list) or of == "COMBO":
                choices = of if isinstance(of, list) else options["options"]
                assert value in choices or key == "concept_name", (key, value)  # is made by another workflow


@every_workflow
def test_a_checkpoint_says_where_it_can_be_had(name):
    for node in workflow(name)["nodes"]:
        if node["type"] == "CheckpointLoaderSimple":
            (model,) = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0] == CHECKPOINT and model["directory"] == "checkpoints"
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(f"/{CHECKPOINT}")


@every_workflow
def test_no_node_lies_on_another_and_each_is_in_one_group_of_a_title(name):
    graph, head = workflow(name), 30
    boxes = [(n["pos"][0], n["pos"][1] - head, n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1])
             for n in graph["nodes"]]
    areas = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in graph["groups"])]
    for some in boxes, areas:
        for (x, y, right, low), (x_, y_, right_, low_) in itertools.combinations(some, 2):
            assert right <= x_ or right_ <= x or low <= y_ or low_ <= y
    for x, y, right, low in boxes:
        assert sum(X <= x and Y <= y and right <= R and low <= B for X, Y, R, B in areas) == 1
    assert all(group["title"] for group in graph["groups"])


@every_workflow
def test_notes_stand_where_there_is_a_choice_and_can_be_read(name):
    notes = [node["widgets_values"][0] for node in workflow(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) >= 3
    assert not any("`" in text for text in notes)  # Nodes 2.0 draws code in a note blue on blue


@every_workflow
def test_a_workflow_makes_a_picture(made, name):
    if name == "use_a_concept":
        made(workflow("tune_from_one_photo"))  # saves the concept that is used
    for picture in made(workflow(name)):
        low, high = picture.convert("L").getextrema()
        assert high - low > 30


def test_every_workflow_and_box_is_frozen():
    assert set(NAMES) <= {path.stem for path in FROZEN.glob("*/*.json")}
    boxes = {path.name for path in (ROOT / "subgraphs").glob("*.json")}
    assert boxes and boxes <= {path.name for path in FROZEN.glob("*/subgraphs/*.json")}


@every_frozen_one
def test_every_value_of_a_frozen_workflow_is_still_the_widgets_of_that_name(info, path):
    now = open_on(info, read(path))
    for key, box in read(path.parent / "queued" / path.name).items():
        assert now[key]["class_type"] == box["class_type"]
        assert box["inputs"].items() <= now[key]["inputs"].items()


@every_frozen_one
def test_a_frozen_workflow_still_makes_a_picture(made, path):
    if path.stem == "use_a_concept":
        made(read(path.parent / "tune_from_one_photo.json"))
    assert made(read(path))
