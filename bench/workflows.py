"""The pictures of the example workflows in ComfyUI's list of templates, each made by running the workflow.

What is shown to a workflow has an edge, the rest it made. One that starts with Load Checkpoint is run with Load Demo
Model and Load Demo Picture, and a note in it says so. New workflows, and boxes of subgraphs/, are also put into
tests/frozen, where they stay as they are: later versions have to open them.
"""

import argparse
import io
import json
import re
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

from ..core.file import write
from ..headless.comfy import ROOT
from ..tests.served import as_prompt, serving
from .sign import KEY, PAPER

FOLDER, FROZEN = ROOT / "example_workflows", ROOT / "tests" / "frozen"
SIDE, GAP, EDGE = 512, 8, 6
DEMO = {"cat": "creature", 512: 128, "text, watermark": "", 7.0: 4.0,
        "a photo of a <tom> in the snow": "a clay model of a <tom> in the snow",
        "a photo of a <tom> at the beach": "an ink drawing of a <tom> wearing a crown at the beach"}

INSTEAD = {"CheckpointLoaderSimple": ("PerfusionDemoModel", {}),
           "LoadImage": ("PerfusionDemoPicture", {"picture": "mimi"})}


def on_demo(graph: dict) -> dict:
    """The prompt with Load Demo Model for Load Checkpoint, and what suits that: picture, words, size, four of it."""
    if any(box["class_type"] in INSTEAD for box in graph.values()):
        for box in graph.values():
            if box["class_type"] in INSTEAD:
                box["class_type"], box["inputs"] = INSTEAD[box["class_type"]]
            box["inputs"] = {key: value if isinstance(value, list) else 4 if key == "batch_size" else
                             DEMO.get(value, value) for key, value in box["inputs"].items()}
    return graph


def card(shown: list[Image.Image], made: list[Image.Image]) -> Image.Image:
    """A square of the pictures, two in a row or a wide one, as many as there is room for; or those of a grid."""
    if len(made) == 1 and made[0].width > 2 * made[0].height:
        return around(shown[0], made[0])
    paper, side, x, y = Image.new("RGB", (SIDE, SIDE), PAPER), (SIDE - GAP) // 2, 0, 0
    for k, picture in enumerate([*shown, *made]):
        edge, wide = EDGE * (k < len(shown)), SIDE if picture.width > picture.height else side
        if x + wide > SIDE:
            x, y = 0, y + side + GAP
        size = wide - 2 * edge, side - 2 * edge
        paper.paste(ImageOps.expand(ImageOps.fit(picture, size, Image.Resampling.LANCZOS), edge, KEY), (x, y))
        x += wide + GAP
    return paper


def around(shown: Image.Image, row: Image.Image) -> Image.Image:
    """A square of what was shown, large, with the five pictures of a row to its right and below it."""
    paper, step = Image.new("RGB", (SIDE, SIDE), PAPER), (SIDE + GAP) // 3
    side, large, high = step - GAP, 2 * step - GAP - 2 * EDGE, row.height
    paper.paste(ImageOps.expand(shown.resize((large, large), Image.Resampling.LANCZOS), EDGE, KEY), (0, 0))
    for k, (x, y) in enumerate(((2, 0), (2, 1), (0, 2), (1, 2), (2, 2))):
        left = k * (row.width - high) // 4
        picture = row.crop((left, 0, left + high, high))
        paper.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x * step, y * step))
    return paper


def freeze(place: str, data: bytes):
    """Keep a file as it is in this version. What is there stays."""
    version = re.search('^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    path = FROZEN / version / place
    if not path.exists():
        print(write(path, data))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of workflows; all, when none is given")
    parser.add_argument("--freeze", action="store_true", help="run none, only freeze")
    arguments = parser.parse_args()
    for path in (ROOT / "subgraphs").glob("*.json"):
        freeze(f"subgraphs/{path.name}", path.read_bytes())
    paths = [FOLDER / f"{name}.json" for name in arguments.names] or sorted(FOLDER.glob("*.json"))  # tune before use
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
        info = server.call("/object_info")
        for path in paths:
            graph = as_prompt(json.loads(path.read_text(encoding="utf-8")), info)
            freeze(path.name, path.read_bytes())
            freeze(f"queued/{path.name}", json.dumps(graph, indent=1).encode())
            if arguments.freeze:
                continue
            graph = on_demo(graph)
            status, outputs, errors = server.run(graph)
            if status != "success":
                raise RuntimeError(f"{path.name}: {errors}")
            given = {key: box["inputs"]["picture"] for key, box in graph.items()
                     if box["class_type"] == "PerfusionDemoPicture"}
            shown = [ROOT / "demo" / "pictures" / f"{name}.png" for name in given.values() if name != "all"]
            made = [server.base / ("temp" if image["type"] == "temp" else "output") / image["filename"]
                    for key, box in graph.items()
                    if box["class_type"] in ("PreviewImage", "SaveImage") and box["inputs"]["images"][0] not in given
                    for image in outputs[key]["images"]]
            out, picture = io.BytesIO(), card(*([Image.open(p).convert("RGB") for p in some] for some in (shown, made)))
            picture.save(out, "JPEG", quality=85)
            print(write(path.with_suffix(".jpg"), out.getvalue()))
