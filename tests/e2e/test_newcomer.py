"""From an empty ComfyUI to a first personalised picture: four clicks, on the demo model, with nothing to download."""

import pytest

pytestmark = [pytest.mark.host, pytest.mark.e2e]


def test_four_clicks_from_an_empty_canvas_to_a_personalised_picture(at, elsewhere, ended):
    assert [path for path in (elsewhere.base / "input").rglob("*") if path.is_file()] == []
    page, before = at(elsewhere), len(elsewhere.call("/history"))
    page.get_by_role("button", name="Templates").first.click()  # 1
    page.get_by_text("perfusion-concepts", exact=True).last.click()  # 2
    page.get_by_text("encode_without_training").last.click()  # 3
    page.wait_for_function("() => app.graph.nodes.length > 5")
    page.get_by_test_id("queue-button").or_(page.get_by_role("button", name="Run", exact=True)).first.click()  # 4
    run = ended(elsewhere, before)
    assert run["status"]["status_str"] == "success"
    shown = [key for key, box in run["prompt"][2].items() if box["class_type"] == "PreviewImage"]
    assert sorted(len(run["outputs"][key]["images"]) for key in shown) == [1, 4]  # what it was given, what it made
