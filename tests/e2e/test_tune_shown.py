"""Quick Tune while it runs: pictures, curve and time on the node, after a reload too, and after a cancel."""

import pytest

pytestmark = [pytest.mark.host, pytest.mark.e2e]
STEPS = 60
NODE = """(app.graph.nodes.find((node) => node.type === "PerfusionQuickTune"))"""
# the width of the picture on the node: an element, or drawn on the canvas
SHOWN = f"""() => {{ const node = {NODE}; const element = document.querySelector(`[data-node-id="${{node.id}}"] img`)
    return element?.naturalWidth || node.imgs?.[0]?.naturalWidth || 0 }}"""
SAYS = f"""() => {{ const node = {NODE}
    return node.widgets.map((w) => String(w.value ?? "")).join(" ") + document.body.innerText }}"""


def begin(page, server, seed):
    """Queue a tune of many steps that nothing on disk holds yet, and wait for its first picture between steps."""
    workflow = server.call("/userdata/workflows%2Fcreature_demo.json")
    for node in workflow["nodes"]:
        if node["type"] == "PerfusionQuickTune":
            node["widgets_values"][2:6] = [STEPS, seed, node["widgets_values"][4], 1]
            node["widgets_values"][7:] = [5]
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_function(f"() => ({SHOWN})() >= 512 && /Step ([6-9]|[1-9][0-9]) of/.test(({SAYS})())")


def test_a_tune_shows_photo_before_now_and_curve_and_after_a_reload_goes_on_showing(at, server, ended):
    page, before = at(server), len(server.call("/history"))
    begin(page, server, seed=101 + page.evaluate("() => Math.floor(1e6 * Math.random())"))
    assert f"of {STEPS}" in page.evaluate(SAYS)
    page.reload()
    page.wait_for_function("() => window.app?.graph?.nodes?.length > 3")
    page.wait_for_function(f"() => ({SHOWN})() >= 512")
    assert ended(server, before)["status"]["status_str"] == "success"
    page.wait_for_function(f"() => ({SHOWN})() > 0")
    page.wait_for_function(f"""() => ({SAYS})().includes("{STEPS} steps, ")""")


def test_a_cancel_says_where_what_was_learnt_is(at, server, ended):
    page, before = at(server), len(server.call("/history"))
    begin(page, server, seed=202 + page.evaluate("() => Math.floor(1e6 * Math.random())"))
    page.evaluate("() => app.api.interrupt()")
    assert ended(server, before)["status"]["status_str"] == "error"
    page.wait_for_function(f"""() => ({SAYS})().includes("stopped-at-")""")
    assert "stopped-at-" in str(server.call("/object_info/PerfusionLoadConcept"))  # in its list
