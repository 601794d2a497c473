"""The texts in other languages, as the host finds them: each one there, none too many, nothing lost of the English.

There is no English file: where a language has no text, the frontend shows that of the schema, and an input's id.
"""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.host
ROOT = Path(__file__).parent.parent
LANGUAGES = "zh", "ja"
# what is the same in every language: the captions' braces, words and commands as they are typed, folders, numbers
KEPT = re.compile(r"{}|<[^>]+>|`[^`]+`|[a-z0-9_]+(?:/[a-z0-9_]+)+|[0-9]+(?:[.,][0-9]+)*")
KANA = re.compile("[\u3041-\u30ff]")

each_language = pytest.mark.parametrize("language", LANGUAGES)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the host answers to /i18n where this pack is its only one."""
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    folder = tmp_path_factory.mktemp("custom_nodes")
    (folder / "perfusion-concepts").symlink_to(ROOT, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(folder)], set()))
        return CustomNodeManager().build_translations()


def english(pack):
    """The schemas' texts by their place in nodeDefs.json, where a dot in an id is written _ as the frontend does."""
    texts = {}
    for schema in (node.define_schema() for node in pack.values()):
        inputs = {thing.id: thing for thing in schema.inputs}
        outputs = {str(place): thing for place, thing in enumerate(schema.outputs)}
        texts |= {(schema.node_id, key): getattr(schema, key) for key in ("display_name", "description")}
        for kind, things in ("inputs", inputs), ("outputs", outputs):
            for name, thing in things.items():
                place = schema.node_id, kind, name.replace(".", "_")
                texts |= {(*place, "name"): thing.display_name or name, (*place, "tooltip"): thing.tooltip}
    return texts


def flat(tree, *above):
    """The texts of a tree of dictionaries by their place in it."""
    if not isinstance(tree, dict):
        return {above: tree}
    return {place: text for key, part in tree.items() for place, text in flat(part, *above, key).items()}


def spoken():
    """The texts that the pack's own controls say, as web/texts.mjs is asked for them."""
    literal = r'"(?:[^"\\]|\\.)*"'
    scripts = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").glob("*.*js")))
    calls = re.findall(rf"(?<![\w.])t\(\s*((?:{literal}\s*\+?\s*)+)", scripts)
    return {"".join(part[1:-1] for part in re.findall(literal, call)) for call in calls}


def settings():
    """The ids of the pack's settings, as the frontend asks for their texts."""
    script = "".join((ROOT / "web" / name).read_text(encoding="utf-8") for name in ("settings.js", "settings.mjs"))
    return {found.replace(".", "_") for found in re.findall(r'"(Perfusion\.[\w.]+)"', script)}


def test_the_host_finds_these_languages_and_nothing_but_texts_of_this_pack(found):
    assert {language: set(parts) for language, parts in found.items()} == dict.fromkeys(
        LANGUAGES, {"nodeDefs", "settings", "perfusion"})


@each_language
def test_every_control_and_setting_of_the_pack_has_its_text_and_keeps_what_is_filled_in(found, language):
    texts = found[language]["perfusion"]
    assert set(texts) == spoken() and len(texts) > 20
    for text, theirs in texts.items():
        assert theirs and set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", theirs)), text
    assert set(found[language]["settings"]) == settings()
    assert all(part for of in found[language]["settings"].values() for part in of.values())


@each_language
def test_every_node_input_and_output_has_its_texts_and_nothing_else_has(pack, found, language):
    there, wanted = flat(found[language]["nodeDefs"]), english(pack)
    assert set(there) - set(wanted) == set() and set(wanted) - set(there) == set()
    assert [place for place, text in there.items() if not isinstance(text, str) or not text.strip()] == []


@each_language
def test_what_is_typed_or_counted_is_as_in_the_english(pack, found, language):
    there = flat(found[language]["nodeDefs"])
    for place, text in english(pack).items():
        assert sorted(KEPT.findall(there[place])) == sorted(KEPT.findall(text)), place


@each_language
def test_a_widgets_choices_are_called_what_the_widget_shows(pack, found, language):
    there = flat(found[language]["nodeDefs"])
    for schema in (node.define_schema() for node in pack.values()):
        for thing in schema.inputs:
            for choice in getattr(thing, "options", None) or ():
                if choice in thing.tooltip:
                    assert choice in there[schema.node_id, "inputs", thing.id, "tooltip"]


@each_language
def test_nodes_are_called_by_their_names_in_that_language(pack, found, language):
    there, wanted = flat(found[language]["nodeDefs"]), english(pack)
    names = {text: there[place] for place, text in wanted.items() if place[1:] == ("display_name",)}
    assert len(set(names.values())) == len(names)
    for place, text in wanted.items():
        for name, own in names.items():
            assert name not in text or own in there[place], (place, name)


@each_language
def test_the_same_thing_is_the_same_text_wherever_it_is_said(pack, found, language):
    there, said = flat(found[language]["nodeDefs"]), {}
    for place, text in english(pack).items():
        said.setdefault((place[-1], text), set()).add(there[place])
    assert [texts for texts in said.values() if len(texts) > 1] == []


@each_language
def test_texts_are_in_that_language_and_are_no_message_syntax_to_the_frontend(found, language):
    for place, text in flat(found[language]["nodeDefs"]).items():
        if place[-1] == "tooltip":  # shown as it is; all else goes through the frontend's message compiler
            text = text.replace("{}", "")
        assert not set(text) & set("{}@|"), place
        if place[-1] in ("tooltip", "description"):
            assert bool(KANA.search(text)) == (language == "ja"), place
