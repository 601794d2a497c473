"""The pack's own boxes on nodes: read in both colour themes, worked by the keyboard, and gone without a trace."""

import io
from collections import Counter

import pytest
from PIL import Image, ImageChops

from pages import drag, run, template

pytestmark = [pytest.mark.host, pytest.mark.e2e]
OURS = """app.graph.nodes.flatMap((node) => node.widgets ?? []).filter((widget) => widget.type.startsWith("perfusion"))
    .map((widget) => widget.element)"""
ACTIVE = """() => { const active = document.activeElement, { x, y, width, height } = active.getBoundingClientRect()
    return { name: active.ariaLabel || active.textContent, ours: OURS.some((element) => element.contains(active)),
             clip: { x: x - 4, y: y - 4, width: width + 8, height: height + 8 } } }""".replace("OURS", OURS)
# each text with its place and colour; a text area's own is where it may be empty
TEXTS = """() => OURS.flatMap((root) => {
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), found = []
    for (let text; (text = walk.nextNode()); ) if (text.data.trim()) found.push([text.parentElement, text])
    for (const area of root.querySelectorAll("textarea")) found.push([area, area])
    return found.map(([element, of]) => {
      const range = document.createRange(), style = getComputedStyle(element)
      range.selectNodeContents(of)
      const { x, y, width, height } = of === element ? element.getBoundingClientRect() : range.getBoundingClientRect()
      return { text: of.data ?? "report", box: [x, y, x + width, y + height],
               colour: element instanceof SVGElement ? style.fill : style.color }
    }).filter(({ box }) => box[2] > box[0]) })""".replace("OURS", OURS)
# listeners on what outlives a node, that a call from this pack's scripts has added and nobody has taken away
WATCH = """
    window.kept = []
    Error.stackTraceLimit = 50
    const { addEventListener: add, removeEventListener: remove } = EventTarget.prototype
    const same = (a, b) => a.target === b.target && a.type === b.type && a.act === b.act
    EventTarget.prototype.addEventListener = function (type, act, options) {
      const one = { target: this ?? window, type, act }
      if (new Error().stack.includes("/perfusion-concepts/") && !kept.some((other) => same(one, other))) kept.push(one)
      return add.call(this, type, act, options)
    }
    EventTarget.prototype.removeEventListener = function (type, act, options) {
      kept = kept.filter((other) => !same({ target: this ?? window, type, act }, other))
      return remove.call(this, type, act, options)
    }"""
LEFT = """() => kept.filter(({ target }) => !(target instanceof Node) || target.isConnected)
    .map(({ target, type }) => `${target.constructor.name} ${type}`).sort()"""


def brightness(colour):
    """The relative luminance of a colour of 0..255, as WCAG 2 has it."""
    parts = [part / 255 for part in colour]
    return sum(weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
               for weight, part in zip((0.2126, 0.7152, 0.0722), parts))


def contrast(one, other):
    dark, light = sorted((brightness(one), brightness(other)))
    return (light + 0.05) / (dark + 0.05)


def picture(page, **options):
    return Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")


@pytest.fixture
def scene(at, server, ended):
    """A page with the nodes that have boxes of ours, side by side, after a run that tells the chart of its words."""
    def one():
        page, before = at(server), len(server.call("/history"))
        template(page, "encode_without_training")
        page.evaluate("""() => { for (const [kind, name, value] of [["KSampler", "steps", 1],
            ["EmptyLatentImage", "batch_size", 1]]) app.graph.nodes.find((node) => node.type === kind)
              .widgets.find((widget) => widget.name === name).value = value }""")
        run(page)
        ended(server, before)
        page.get_by_text("How far each word opens it").wait_for()
        drag(page, 1)
        page.evaluate("""() => {
            app.graph._groups = []
            for (const node of app.graph.nodes) node.pos = [9000, node.pos[1]]
            for (const [kind, x, y] of [["PerfusionLoadConcept", 90, 120], ["PerfusionConceptDoctor", 880, 240]]) {
              const node = LiteGraph.createNode(kind); node.pos = [x, y]; app.graph.add(node)
            }
            app.graph.nodes.find((node) => node.type === "PerfusionGateStrength").pos = [480, 120]
            app.canvas.ds.offset = [0, 0]
            app.canvas.setDirty(true, true) }""")
        page.get_by_text(", a creature, for").wait_for()
        page.wait_for_timeout(700)
        return page

    return one


def test_every_text_of_ours_stands_out_from_its_ground_in_both_themes(scene, choose):
    page = scene()
    for theme in "light", "dark":
        page.evaluate("(theme) => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
        page.wait_for_timeout(700)
        shown, texts = picture(page), page.evaluate(TEXTS)
        assert {"open", "the concept", "<ted>", "Embed in workflow", "Copy the report", "report"} <= {
            found["text"] for found in texts}
        for found in texts:
            (_, ground) = max((n, colour) for colour, n in Counter(shown.crop(found["box"]).getdata()).items())
            colour = [float(part) for part in found["colour"].removeprefix("rgb(").rstrip(")").split(",")]
            assert len(colour) == 3 and contrast(colour, ground) >= 4.5, (theme, found, ground)


def test_tab_reaches_every_control_of_ours_and_shows_where_it_is_and_the_keys_work_them(scene):
    page, seen = scene(), {}
    page.evaluate("() => document.activeElement.blur()")
    for _ in range(150):
        page.keyboard.press("Tab")
        active = page.evaluate(ACTIVE)
        if active["ours"] and active["name"] not in seen:
            focused = picture(page, clip=active["clip"])
            page.evaluate("() => (window.was = document.activeElement).blur()")
            seen[active["name"]] = ImageChops.difference(focused, picture(page, clip=active["clip"])).getbbox()
            page.evaluate("() => was.focus({ focusVisible: true })")
    there = page.evaluate(f"""() => {OURS}.flatMap((root) => [...root.querySelectorAll("button, textarea")])
        .map((control) => control.ariaLabel || control.textContent)""")
    assert seen.keys() == set(there) >= {"Embed in workflow", "Copy the report", "report"}
    assert all(seen.values()), seen

    page.get_by_role("button", name="Embed in workflow").press("Enter")
    page.get_by_role("button", name="Confirm").press("Enter")
    page.get_by_text("embedded: ").wait_for()
    page.get_by_role("button", name="Take out of workflow").press("Space")
    page.get_by_role("button", name="Embed in workflow").wait_for()


def test_no_listener_of_ours_is_left_when_nodes_are_gone(at, put, server):
    page = at(server, WATCH)
    before = page.evaluate(LEFT)
    assert "HTMLDocument drop" in before and "ComfyApi perfusion.gate" in before  # so the watch does see them
    for kind in [kind for kind in server.call("/object_info") if kind.startswith("Perfusion")]:
        put(page, kind)
        page.wait_for_timeout(250)
        page.evaluate("() => app.graph.remove(app.graph.nodes[0])")
    page.wait_for_timeout(500)
    assert page.evaluate("() => app.graph.nodes.length") == 0 and page.evaluate(LEFT) == before
