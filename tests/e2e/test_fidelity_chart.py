"""A measured concept in Gate Strength's chart: its two lines, the dial on them, and which strength auto takes."""

import pytest

pytestmark = [pytest.mark.host, pytest.mark.e2e]
NAME = "measured.safetensors"
NODE = """app.graph.nodes.find((node) => node.type === "PerfusionGateStrength")"""
LINES = f"""() => [...{NODE}.widgets.at(-1).element.querySelectorAll("svg:nth-of-type(1) polyline")].map((line) =>
    line.getAttribute("points").trim().split(/\\s+/).map((point) => point.split(",").map(Number)))"""
DIAL = f"""() => {NODE}.widgets.at(-1).element.querySelector("path.dial")?.nextElementSibling.textContent ?? null"""


@pytest.fixture(scope="module")
def measured(server):
    """A concept's file with a curve, in the server's list."""
    from perfusion.core.concept import load, save
    from perfusion.core.fidelity import PROMPTS, Curve

    folder = server.base / "output" / "perfusion"
    concept = load(next(folder.glob("*.safetensors")))
    curve = Curve((0.0, 0.5, 1.0), (0.0, 0.3, 0.4), (1.0, 0.8, 0.5), "a" * 64, PROMPTS, 0)
    save(concept.at(curve.knee).replace(fidelity=curve), folder / NAME)
    return curve


def loaded(page, mode):
    """Load, dial and save the measured concept; run that."""
    page.evaluate("""([name, mode]) => {
        const [load, dial, save] = ["LoadConcept", "GateStrength", "SaveConcept"].map((kind, k) => {
            const node = LiteGraph.createNode(`Perfusion${kind}`)
            node.pos = [30 + 400 * k, 60]
            app.graph.add(node)
            return node
        })
        load.widgets[0].value = name
        dial.widgets.find((widget) => widget.name === "bias_mode").value = mode
        load.connect(0, dial, 0)
        dial.connect(0, save, 0) }""", [NAME, mode])
    page.evaluate("""() => new Promise((done) => {
        app.api.addEventListener("execution_success", done, { once: true }); app.queuePrompt(0, 1) })""")
    page.wait_for_function(f"() => ({LINES})().length === 3")  # the gate's, likeness, obedience


def turn(page, name, value):
    page.evaluate(f"""([name, value]) => {{ const node = {NODE}
        const widget = node.widgets.find((widget) => widget.name === name)
        widget.value = value; widget.callback(value, app.canvas, node) }}""", [name, value])


def test_its_lines_are_in_the_chart_and_the_dial_moves_on_them(at, server, measured):
    page = at(server)
    loaded(page, "slider")
    _, likeness, obedience = page.evaluate(LINES)
    assert [x for x, _ in likeness] == [x for x, _ in obedience] == sorted({x for x, _ in likeness})
    low, high = likeness[0][1], obedience[0][1]  # 0 and 1; pixels count downwards
    for line, values in (likeness, measured.likeness), (obedience, measured.obedience):
        assert [(low - y) / (low - high) for _, y in line] == pytest.approx(values, abs=0.01)
    assert page.evaluate(DIAL) == "0.75"
    turn(page, "strength", 0.3)
    assert page.evaluate(DIAL) == "0.30"
    turn(page, "bias_mode", "raw")
    assert page.evaluate(DIAL) is None and len(page.evaluate(LINES)) == 3
    assert page.get_by_role("img", name="Likeness and obedience over strength.").count() == 1


def test_auto_says_and_marks_the_strength_that_the_concept_carries(at, server, measured):
    page = at(server)
    loaded(page, "auto")
    knee = f"{measured.knee:.2f}"
    assert knee not in ("0.75", "0.30") and page.evaluate(DIAL) == knee
    assert page.get_by_text(f"Auto: strength {knee}, which the concept carries.").count() == 1
    turn(page, "strength", 0.3)
    assert page.evaluate(DIAL) == knee
    turn(page, "bias_mode", "slider")
    assert page.evaluate(DIAL) == "0.30" and page.get_by_text("Auto:").count() == 0


def test_auto_before_any_run_says_that_the_concept_has_it(at, server, put):
    page = at(server)
    put(page, "PerfusionGateStrength")
    turn(page, "bias_mode", "auto")
    assert page.get_by_text("Auto: the strength that the concept carries.").count() == 1
    assert page.evaluate(DIAL) is None
