"""The pack's page in the host's settings, and its own controls in the language that is chosen there."""

import pytest

pytestmark = [pytest.mark.host, pytest.mark.e2e]
FIRST = """(kind) => app.graph.nodes.find((node) => node.type === kind)"""


def value(page, kind, name):
    """A widget's value on the first node of a kind."""
    return page.evaluate(f"([kind, name]) => ({FIRST})(kind).widgets.find((w) => w.name === name).value", [kind, name])


def test_new_quick_tunes_have_the_chosen_preview_and_loaded_ones_keep_theirs(at, server, put, choose):
    choose({"Perfusion.QuickTune.PreviewEvery": 4})
    page = at(server)
    put(page, "PerfusionQuickTune")
    assert value(page, "PerfusionQuickTune", "preview_every") == 4
    page.evaluate("""() => { const data = app.graph.serialize(); data.nodes[0].widgets_values.splice(-1, 1, 7)
        return app.loadGraphData(data) }""")
    assert value(page, "PerfusionQuickTune", "preview_every") == 7


def test_a_chosen_concept_is_embedded_where_the_settings_say_so(at, server, put, choose):
    choose({"Perfusion.Concepts.EmbedByDefault": True})
    page = at(server)
    put(page, "PerfusionLoadConcept")
    page.evaluate(f"""() => {{ const widget = ({FIRST})("PerfusionLoadConcept").widgets[0]
        widget.value = widget.options.values[0]; widget.callback(widget.value) }}""")
    page.wait_for_function(f"""() => ({FIRST})("PerfusionLoadConcept").widgets[1].value.length > 1000""")
    assert "It travels in this workflow" in page.evaluate("() => document.body.innerText")


def test_the_packs_controls_and_settings_speak_the_chosen_language(at, server, put, choose):
    choose({"Comfy.Locale": "ja"})
    page = at(server)
    put(page, "PerfusionLoadConcept")
    page.wait_for_function("() => document.body.innerText.includes('ワークフローに埋め込む')")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    page.get_by_text("Perfusion", exact=True).first.click()
    page.wait_for_function("() => document.body.innerText.includes('コンセプトを既定でワークフローに埋め込む')")
    assert "extra_model_paths.yaml" in page.evaluate("() => document.body.innerText")
