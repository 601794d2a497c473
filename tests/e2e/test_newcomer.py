"""From an empty ComfyUI to a first personalised picture: four clicks, on the demo model, with nothing to download."""

import pytest

from pages import run, template

pytestmark = [pytest.mark.host, pytest.mark.e2e]


def test_four_clicks_from_an_empty_canvas_to_a_personalised_picture(at, elsewhere, ended):
    assert [path for path in (elsewhere.base / "input").rglob("*") if path.is_file()] == []
    page, before = at(elsewhere), len(elsewhere.call("/history"))
    template(page, "encode_without_training")  # 1, 2, 3
    run(page)  # 4
    told = ended(elsewhere, before)
    assert told["status"]["status_str"] == "success"
    shown = [key for key, box in told["prompt"][2].items() if box["class_type"] == "PreviewImage"]
    assert sorted(len(told["outputs"][key]["images"]) for key in shown) == [1, 4]  # what it was given, what it made
