"""Concept Doctor: its report is read and copied on the node, and belongs to no file."""

import pytest

from pages import press, run

pytestmark = [pytest.mark.host, pytest.mark.e2e]
REPORT = """() => document.querySelector("textarea[aria-label=report]")?.value ?? """ + '""'
COPIED = "() => navigator.clipboard.readText()"


@pytest.fixture
def reported(at, put, server, ended):
    """A page with the report on its node, and the report as the server gave it."""
    page, before = at(server), len(server.call("/history"))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    put(page, "PerfusionConceptDoctor")
    run(page)
    (output,) = ended(server, before)["outputs"].values()
    page.wait_for_function(f"() => ({REPORT})()")
    return page, output["text"][0]


def test_the_report_is_on_the_node_as_the_server_gave_it_and_in_no_file(reported):
    page, report = reported
    assert report.startswith("# Concept Doctor\n") and "creature.safetensors" in report
    assert page.evaluate(REPORT) == report
    assert page.get_by_label("report").is_visible()
    saved = page.evaluate("async () => [app.graph.serialize(), await app.graphToPrompt()]")
    assert "# Concept Doctor" not in str(saved)


def test_a_button_copies_the_report_and_so_do_the_keys_that_copy(reported):
    page, report = reported
    press(page, "Copy the report")
    assert page.evaluate(COPIED) == report
    page.evaluate("() => navigator.clipboard.writeText('another text')")
    page.get_by_label("report").click()
    page.keyboard.press("Control+a")
    page.keyboard.press("Control+c")
    assert page.evaluate(COPIED) == report


def test_the_report_is_there_again_after_another_workflow_was_shown(reported):
    page, report = reported
    page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("() => app.graph.nodes.length === 0")
    page.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.wait_for_function("() => app.graph.nodes.length === 1")
    page.wait_for_function(f"() => ({REPORT})()")
    assert page.evaluate(REPORT) == report
