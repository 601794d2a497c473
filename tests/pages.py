"""What an artist's hands do on ComfyUI's page, and what an artist reads there."""

import os
import shutil

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
READY = """() => window.app?.extensionManager && window.LiteGraph?.registered_node_types.PerfusionLoadConcept
               && document.querySelector("canvas")"""
CHART = """() => app.graph.nodes.find((node) => node.type === "PerfusionGateStrength").widgets.at(-1).element"""


def browser(play):
    """Playwright's browser, of one that is installed. Raises ValueError with what to install."""
    own = play.chromium.executable_path  # where Playwright would put one; it downloads none unless it is told to
    found = filter(None, (os.environ.get("CHROMIUM"), *map(shutil.which, NAMES), os.path.exists(own) and own))
    if not (path := next(found, None)):
        raise ValueError(f"None of {', '.join(NAMES)} is installed. On Debian: apt-get install chromium. Elsewhere: "
                         ".venv/bin/playwright install chromium, or put a browser's path into $CHROMIUM.")
    return play.chromium.launch(executable_path=path, args=FLAGS)


def begin(page, url):
    """Open a server's page, with nothing on the canvas."""
    page.goto(url)
    page.wait_for_function(READY)
    page.wait_for_timeout(1500)  # the host restores its last workflow
    page.evaluate("() => { app.graph.clear(); app.canvas.ds.offset = [0, 0]; app.canvas.ds.scale = 1 }")


def template(page, name):
    """Open a workflow of the pack from the browser's list of templates, in three clicks."""
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_text("perfusion-concepts", exact=True).last.click()
    page.get_by_text(name).last.click()
    page.wait_for_function("() => app.graph.nodes.length > 5")


def run(page):
    """Click what queues the workflow."""
    page.get_by_test_id("queue-button").or_(page.get_by_role("button", name="Run", exact=True)).first.click()


def press(page, name):
    """Press a button by the keyboard."""
    page.get_by_role("button", name=name).focus()
    page.keyboard.press("Enter")


def drag(page, place):
    """Drag the dial of Gate Strength with the mouse to a place in 0..1, and give what it says then. The node is brought
    near first: zoomed out, the host's own slider runs ahead of the mouse."""
    page.evaluate("""() => {
        const node = app.graph.nodes.find((node) => node.type === "PerfusionGateStrength"), { ds } = app.canvas
        ds.scale = 1
        ds.offset = [500 - node.pos[0], 250 - node.pos[1]]
        app.canvas.setDirty(true, true) }""")
    page.wait_for_timeout(300)
    slider = page.get_by_label("strength", exact=True).first
    if slider.count():  # Nodes 2.0
        track, box = slider.bounding_box(), slider.get_by_role("slider").bounding_box()
        start, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        end = track["x"] + place * track["width"]
    else:  # drawn on the canvas, with a margin of 15 left and right
        start, end, y = page.evaluate("""(place) => {
            const node = app.graph.nodes.find((node) => node.type === "PerfusionGateStrength"), [dial] = node.widgets
            const { left, top } = app.canvas.canvas.getBoundingClientRect()
            const at = (part) => app.canvas.convertOffsetToCanvas(
                [node.pos[0] + 15 + part * (node.size[0] - 30), node.pos[1] + dial.last_y + 10])
            return [at(dial.value)[0] + left, at(place)[0] + left, at(place)[1] + top] }""", place)
    page.mouse.move(start, y)
    page.mouse.down()
    page.mouse.move(end, y, steps=8)
    page.mouse.up()
    return page.evaluate("""() => app.graph.nodes.find((n) => n.type === "PerfusionGateStrength").widgets[0].value""")


def chips(page):
    """The words of the chart and their percentages."""
    return page.evaluate(f"""() => [...({CHART})().querySelectorAll("span")].map((chip) =>
        [chip.firstChild.textContent, Number(chip.querySelector("small").textContent)])""")


def shades(page):
    """The colours of the chart's words."""
    return page.evaluate(f"""() => [...({CHART})().querySelectorAll("span")].map((chip) =>
        getComputedStyle(chip).backgroundColor)""")
