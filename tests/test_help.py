"""The help pages: one for each node, with all that it takes and gives, and no sentence that the code does not say."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.host
ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").rglob("*.md")}

every_page = pytest.mark.parametrize("name", sorted(PAGES))


def section(page, title):
    """The text under a heading."""
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0].strip()


def rows(text):
    """The cells of a table, without its head, and without the marks of code."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def default(thing):
    """What a page has in the default's column for an input."""
    value = getattr(thing, "default", None)
    if value is None:
        return "optional" if thing.optional else "required"
    return ("off", "on")[value] if isinstance(value, bool) else str(value).replace("\n", " · ") or "empty"


def said():
    """What the code can say: the constant parts of its texts, a gap where something is filled in."""
    parts = []
    for path in [*(ROOT / "core").glob("*.py"), *(ROOT / "nodes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                values = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                parts.append("".join(values))
    return parts


def test_every_node_has_a_page_and_every_page_a_node(pack):
    assert set(PAGES) == set(pack)
    assert not list((ROOT / "web" / "docs").rglob("*.js"))  # the frontend would run it


@every_page
def test_a_page_names_its_node_and_all_inputs_and_outputs_in_order_with_their_defaults(pack, name):
    schema, page = pack[name].define_schema(), PAGES[name]
    assert page.startswith(f"# {schema.display_name}\n\n")
    inputs, outputs = rows(section(page, "Inputs")), rows(section(page, "Outputs"))
    assert [row[:2] for row in inputs] == [[i.id, default(i)] for i in schema.inputs]
    assert [row[0] for row in outputs] == [o.display_name for o in schema.outputs]
    assert all(row[-1] for row in [*inputs, *outputs])
    assert section(page, "Connect it with")


@every_page
def test_what_a_page_says_the_node_says_is_in_the_code(name):
    wrong = section(PAGES[name], "When it goes wrong")
    assert len(re.findall(r"^- ", wrong, re.M)) >= 2
    quotes = re.findall(r"^- \*([^*]+)\*", wrong, re.M)
    assert quotes
    there = said()
    for quote in quotes:
        pattern = re.compile(".*".join(re.escape(part) for part in " ".join(quote.split()).split("…")), re.S)
        assert any(pattern.search(text) for text in there), quote


@every_page
def test_no_word_in_angle_brackets_is_lost_as_a_tag(name):
    assert not re.search(r"<", re.sub(r"`[^`]*`", "", PAGES[name]))


@every_page
def test_a_page_has_a_picture_that_is_there_small_and_said_in_words(name):
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", PAGES[name])
    assert pictures and all(len(words) > 20 for words, _ in pictures)
    assert all((ROOT / "web" / "docs" / place).stat().st_size <= 60 * 1024 for _, place in pictures)


def test_no_picture_is_there_that_no_page_shows():
    shown = {place for page in PAGES.values() for place in re.findall(r"\]\(([^)]+\.jpg)\)", page)}
    assert shown == {path.name for path in (ROOT / "web" / "docs").glob("*.jpg")}
