"""The whole of it once: a template, the dial, the picture, and the concept that travels in it to somebody else."""

import io
import itertools
import urllib.parse
import urllib.request

import pytest
from PIL import Image

from pages import chips, drag, press, run, shades, template

pytestmark = [pytest.mark.host, pytest.mark.e2e]
SEEDS = itertools.count(9001)  # the host makes no picture twice
# what is shared needs no more of the template than what draws: what made and saved the concept is taken away
SHARED = """() => {
    const of = (kind) => app.graph.nodes.filter((node) => node.type === kind)
    of("PerfusionLoadConcept")[0].connect(0, of("PerfusionGateStrength")[0], 0)
    for (const kind of ["EncodeConcept", "LoadDomain", "DemoPicture", "SaveConcept"])
      of(`Perfusion${kind}`).forEach((node) => app.graph.remove(node))
    app.graph.remove(of("PreviewImage").find((node) => node.inputs[0].link == null)) }"""


def drawn(page, server, ended):
    """The files of the four pictures that a run from the page makes."""
    before = len(server.call("/history"))
    run(page)
    told = ended(server, before)
    assert told["status"]["status_str"] == "success", told["status"]
    (images,) = (output["images"] for output in told["outputs"].values() if len(output.get("images", [])) == 4)
    files = []
    for image in images:
        with urllib.request.urlopen(f"{server.url}/view?{urllib.parse.urlencode(image)}") as answer:
            files.append(answer.read())
    return files


def pixels(files):
    return [Image.open(io.BytesIO(file)).tobytes() for file in files]


def percent(chip):
    return chip[1]


def opening(chips):
    """How far the concept's own word opens its gate, in percent."""
    return dict(chips)["<ted>"]


def test_a_dragged_dial_changes_picture_and_chips_and_the_picture_brings_its_concept_to_somebody_else(
        at, drop, server, elsewhere, ended):
    page, own = at(server), server.base / "output" / "perfusion" / "ted.safetensors"
    template(page, "encode_without_training")
    page.evaluate("""(seed) => { app.graph.nodes.find((node) => node.type === "KSampler").widgets[0].value = seed }""",
                  next(SEEDS))
    first = drawn(page, server, ended)
    page.wait_for_function("() => document.body.innerText.includes('How far each word opens it')")
    bright, vivid = chips(page), shades(page)
    assert max(bright, key=percent)[0] == "<ted>"

    assert drag(page, 0.25) == pytest.approx(0.25, abs=0.06)
    assert opening(chips(page)) < opening(bright) / 2 and shades(page) != vivid
    second = drawn(page, server, ended)
    assert opening(chips(page)) < opening(bright) / 2
    assert all(one != other for one, other in zip(pixels(first), pixels(second)))

    drop(page, "ted.safetensors", own.read_bytes())
    page.get_by_text("<ted>, a creature").wait_for()
    press(page, "Embed in workflow")
    page.get_by_role("button", name="Confirm").click()
    page.get_by_text("embedded: <ted>").wait_for()
    page.evaluate(SHARED)
    made = drawn(page, server, ended)

    (elsewhere.base / "output" / "perfusion" / own.name).unlink(missing_ok=True)  # the newcomer's, of this template
    assert not list(elsewhere.base.rglob(own.name)) and not list((elsewhere.base / "models").rglob("*.safetensors"))
    other = at(elsewhere)
    drop(other, "shared.png", made[0], "image/png")
    other.get_by_text("embedded: <ted>").wait_for()
    assert pixels(drawn(other, elsewhere, ended)) == pixels(made)
