"""Gate Strength's chart: core's gate in the browser, live under the dial, and after a run each word of the prompt."""

import pytest
import torch

from pages import chips, template

pytestmark = [pytest.mark.host, pytest.mark.e2e]
SMALL = {"PerfusionQuickTune": {2: 2, 5: 1}, "KSampler": {2: 2}, "EmptyLatentImage": {2: 1}}  # steps, batch


def run(page, server, change=lambda node: None):
    """Queue the demo workflow, made small and changed, and wait for its end."""
    workflow = server.call("/userdata/workflows%2Fcreature_demo.json")
    for node in workflow["nodes"]:
        for place, value in SMALL.get(node["type"], {}).items():
            node["widgets_values"][place] = value
        change(node)
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    page.evaluate("""() => new Promise((done) => {
        app.api.addEventListener("execution_success", done, { once: true }); app.queuePrompt(0, 1) })""")
    page.wait_for_timeout(300)


def turn(page, value):
    """Turn the dial, as a drag does, without a run."""
    page.evaluate("""(value) => { const node = app.graph.nodes.find((n) => n.type === "PerfusionGateStrength")
        const dial = node.widgets[0]; dial.value = value; dial.callback(value, app.canvas, node) }""", value)


def test_the_browsers_gate_is_that_of_core(at, server):
    from perfusion.core.key_lock import BIAS, TEMPERATURE, gate

    page, places = at(server), torch.linspace(-1, 2, 31, dtype=torch.float64)
    for strength in 0.01, 0.5, 1.0:
        there = page.evaluate("""async ([places, strength]) => {
            const { dialled, gate } = await import("/extensions/perfusion-concepts/gate.mjs")
            const { bias, temperature, scale } = dialled({ strength, bias_mode: "slider" })
            return places.map((s) => scale * gate(s, bias, temperature)) }""", [places.tolist(), strength])
        here = strength * gate(places, BIAS, TEMPERATURE)
        torch.testing.assert_close(torch.tensor(there, dtype=torch.float64), here)


def test_each_word_is_a_chip_after_a_run_and_follows_the_dial_without_one(at, server):
    page = at(server)
    run(page, server)
    words = "a clay model of a <mimi> wearing a crown at the beach".split()
    at_half = chips(page)
    assert [word for word, _ in at_half] == [*words, "(rest)"]
    turn(page, 1.0)
    at_full = chips(page)
    assert all(more >= less for (_, more), (_, less) in zip(at_full, at_half)) and at_full != at_half
    turn(page, 0)
    assert {percent for _, percent in chips(page)} == {0}
    assert page.get_by_text("the plain model, with the word creature").is_visible()


def test_a_run_that_encodes_nothing_again_tells_a_fresh_page_of_its_words_too(at, server):
    first = at(server)
    run(first, server)
    fresh = at(server)
    run(fresh, server)
    assert chips(fresh) == chips(first) != []


def test_a_prompt_without_the_word_is_said_to_open_nothing(at, server):
    def forget(node):
        if node["type"] == "CLIPTextEncode" and node["widgets_values"][0]:
            node["widgets_values"][0] = "a creature at the beach"

    page = at(server)
    run(page, server, forget)
    assert chips(page) == [] and page.get_by_text("No prompt says <mimi>").is_visible()


def test_a_concept_of_which_nothing_was_encoded_is_off_and_the_chart_says_why(at, server, ended):
    page, before = at(server), len(server.call("/history"))
    template(page, "encode_without_training")
    page.evaluate("""() => {
        const of = (kind) => app.graph.nodes.find((node) => node.type === kind)
        const empty = LiteGraph.createNode("EmptyImage"); app.graph.add(empty)
        empty.connect(0, of("PerfusionEncodeConcept"), "image")
        of("KSampler").widgets.find(({ name }) => name === "steps").value = 1 }""")
    page.evaluate("() => app.queuePrompt(0, 1)")
    assert ended(server, before)["status"]["status_str"] == "success"
    page.get_by_text("Nothing was encoded: no picture looked like a creature.").wait_for()
    assert page.get_by_role("img", name="The gate is shut.").is_visible()
    turn(page, 1.0)
    assert page.get_by_role("img", name="The gate is shut.").is_visible() and {n for _, n in chips(page)} <= {0}


def test_a_chart_of_a_node_that_is_gone_is_gone(at, server, put):
    page = at(server)
    put(page, "PerfusionGateStrength")
    page.get_by_role("img", name="half open").wait_for()
    page.evaluate("() => app.graph.remove(app.graph.nodes[0])")
    page.get_by_role("img", name="half open").wait_for(state="detached")
