"""The pictures of the help pages that the pack's nodes make in ComfyUI, on the demo model.

    quick_tune.jpg    what Quick Tune leaves on its node
    where.jpg         a picture, and the map of Where It Acted
    regions.jpg       two concepts in one picture: everywhere, kept apart, and with a region for each
    sweep.jpg         two concepts at three strengths each
    fidelity.jpg      the sheet of Fidelity Curve
"""

import io
import json
import urllib.parse
import urllib.request

from PIL import Image, ImageDraw, ImageFont

from ..core.fidelity import PROMPTS
from ..headless.comfy import ROOT
from ..tests.served import as_prompt

PAIR, SEEDS = ("mimi", "ted"), (1, 2)
PROMPT = "a flat drawing of a <mimi> on the left beside a <ted> in the snow"


def grid(rows: list[list[Image.Image]], above: list[str], beside: list[str], size: tuple[int, int]) -> Image.Image:
    """A table of pictures fitted to a size, a line of text above each column and under each row; "" leaves none."""
    (wide, high), line, gap = size, 22, 4
    top, under = line * any(above), line * any(beside)
    paper = Image.new("RGB", (len(above) * (wide + gap) - gap, top + len(rows) * (high + gap + under) - gap), "white")
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(14)
    for k, text in enumerate(above):
        pen.text((k * (wide + gap) + 4, 3), text, "black", font)
    for n, (row, text) in enumerate(zip(rows, beside)):
        y = top + n * (high + gap + under)
        for k, picture in enumerate(row):
            paper.paste(picture.resize(size, Image.Resampling.LANCZOS), (k * (wide + gap), y))
        pen.text((4, y + high + 2), text, "black", font)
    return paper


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def run(server, graph: dict, key: str) -> list[Image.Image]:
    """The pictures that a graph's node shows. Raises RuntimeError where the run fails."""
    status, outputs, errors = server.run(graph)
    if status != "success":
        raise RuntimeError(errors)
    files = [f"{server.url}/view?{urllib.parse.urlencode(image)}" for image in outputs[key]["images"]]
    return [Image.open(io.BytesIO(urllib.request.urlopen(file).read())).convert("RGB") for file in files]


def example(server, name: str) -> dict:
    """An example workflow as a prompt."""
    workflow = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return as_prompt(workflow, server.call("/object_info"))


def key_of(graph: dict, kind: str) -> str:
    return next(key for key, box in graph.items() if box["class_type"] == kind)


def quick_tune(server) -> Image.Image:
    graph = example(server, "creature_demo")
    return run(server, graph, key_of(graph, "PerfusionQuickTune"))[0]


def where(server) -> Image.Image:
    graph = example(server, "encode_without_training")
    sampler, decoded = key_of(graph, "KSampler"), key_of(graph, "VAEDecode")
    graph[key_of(graph, "EmptyLatentImage")]["inputs"]["batch_size"] = 1
    graph["trace"] = node("PerfusionTrace", model=graph[sampler]["inputs"]["model"])
    graph[sampler]["inputs"]["model"] = ["trace", 0]
    graph["map"] = node("PerfusionWhere", trace=["trace", 1], samples=[sampler, 0], image=[decoded, 0])
    graph |= {"made": node("PreviewImage", images=[decoded, 0]), "shown": node("PreviewImage", images=["map", 0])}
    (picture,), (shown,) = run(server, graph, "made"), run(server, graph, "shown")
    paper = Image.new("RGB", (2 * shown.width + 4, shown.height), "#202020")
    paper.paste(picture.resize((shown.width, shown.width), Image.Resampling.LANCZOS), (0, 0))
    paper.paste(shown, (shown.width + 4, 0))
    return paper


def two(regions: bool = False, apart: bool = True, seed: int = 1, sweep: str = "") -> dict:
    """A picture of two concepts, each in its half of it with `regions`; with `sweep` at all of these strengths."""
    graph = {"model": node("PerfusionDemoModel"),
             "domain": node("PerfusionLoadDomain", domain_name="creature.safetensors"),
             "none": node("SolidMask", value=0.0, width=128, height=128),
             "half": node("SolidMask", value=1.0, width=64, height=128),
             "mimi": node("MaskComposite", destination=["none", 0], source=["half", 0], x=0, y=0, operation="add"),
             "ted": node("InvertMask", mask=["mimi", 0])}
    model, clip = ["model", 0], ["model", 1]
    for who in PAIR:
        graph[f"photo {who}"] = node("PerfusionDemoPicture", picture=who)
        graph[f"encode {who}"] = node(
            "PerfusionEncodeConcept", domain=["domain", 0], model=["model", 0], clip=["model", 1], vae=["model", 2],
            clip_vision=["model", 3], image=[f"photo {who}", 0], superclass="creature", word=f"<{who}>")
        graph[f"gate {who}"] = node(
            "PerfusionGateStrength", concept=[f"encode {who}", 0], strength=0.75, bias_mode="slider", bias=0.7,
            temperature=0.1, **({"region": [who, 0]} if regions else {}))
        if not sweep:
            graph[f"apply {who}"] = node("PerfusionApplyConcept", model=model, clip=clip, concept=[f"gate {who}", 0],
                                         edit_negative=False, keep_apart=apart)
            model, clip = [f"apply {who}", 0], [f"apply {who}", 1]
    if sweep:
        graph["sweep"] = node("PerfusionGateSweep", model=model, clip=clip, concept=["gate mimi", 0], strengths=sweep,
                              concept_b=["gate ted", 0], strengths_b=sweep)
        model, clip = ["sweep", 0], ["sweep", 1]
    return graph | {
        "yes": node("CLIPTextEncode", clip=clip, text=PROMPT), "no": node("CLIPTextEncode", clip=clip, text=""),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sampler": node("KSampler", model=model, positive=["yes", 0], negative=["no", 0], latent_image=["empty", 0],
                        seed=seed, steps=20, cfg=4.0, sampler_name="euler", scheduler="normal", denoise=1.0),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "made": node("PreviewImage", images=["decode", 0])}


def regions(server) -> Image.Image:
    photos = [Image.open(ROOT / "demo" / "pictures" / f"{who}.png").convert("RGB") for who in PAIR]
    rows = [[photo, *(run(server, two(*how, seed), "made")[0] for how in ((False, False), (False, True), (True, True)))]
            for photo, seed in zip(photos, SEEDS)]
    above = ["", "keep_apart off", "keep_apart on", "a half for each"]
    return grid(rows, above, [f"<{who}>" for who in PAIR], (192, 192))


def sweep(server) -> Image.Image:
    made = run(server, two(sweep="0, .5, 1"), "made")
    return grid([made[k : k + 3] for k in (0, 3, 6)], [f"<mimi> {s}" for s in ("0", ".5", "1")],
                [f"<ted> {s}" for s in ("0", ".5", "1")], (192, 192))


def fidelity(server) -> Image.Image:
    """Of an encoded concept, with what the node begins with but for the demo's size."""
    graph = {key: box for key, box in two(False).items() if key in ("model", "domain", "photo mimi", "encode mimi")}
    graph["curve"] = node("PerfusionFidelityCurve", model=["model", 0], clip=["model", 1], vae=["model", 2],
                          clip_vision=["model", 3], concept=["encode mimi", 0], image=["photo mimi", 0],
                          strengths="0, .25, .5, .75, 1", prompts="\n".join(PROMPTS), seed=0, resolution=128)
    made, = run(server, graph | {"shown": node("PreviewImage", images=["curve", 1])}, "shown")
    return made.resize((made.width * 3 // 4, made.height * 3 // 4), Image.Resampling.LANCZOS)


def made(server):
    """Each picture's name and the picture."""
    for one in (quick_tune, where, regions, sweep, fidelity):
        yield one.__name__, one(server)
