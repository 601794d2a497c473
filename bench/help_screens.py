"""The pictures of the help pages that show a node as it stands on the canvas: a browser's, before a server.

    chart.jpg     Gate Strength after a run
    save.jpg      Save Perfusion Concept after a run
    load.jpg      Load Perfusion Concept with what was saved
    doctor.jpg    Concept Doctor with its report on that
"""

import io

from PIL import Image

from ..tests import pages

NODE = """(kind) => app.graph.nodes.find((node) => node.type === kind)"""


def shot(page, kind: str, wide: int, high: int) -> Image.Image:
    """A node by itself, as large as it has to be and no smaller than this."""
    page.evaluate(f"""([kind, wide, high]) => {{ const node = ({NODE})(kind)
        for (const other of app.graph.nodes) other.pos = [5000, 0]
        node.pos = [200, 180]
        node.setSize([wide, high])
        app.canvas.ds.offset = [0, 0]
        app.canvas.ds.scale = 1
        app.canvas.deselectAll()
        app.canvas.setDirty(true, true) }}""", [kind, wide, high])
    page.wait_for_timeout(1000)
    place = page.evaluate(f"(kind) => ({NODE})(kind).id", kind)
    return Image.open(io.BytesIO(page.locator(f'[data-node-id="{place}"]').screenshot())).convert("RGB")


def add(page, kind: str, *links: tuple[str, int, str]):
    """A node more, with links from outputs of others to its inputs."""
    page.evaluate(f"""([kind, links]) => {{ const node = LiteGraph.createNode(kind); app.graph.add(node)
        for (const [from, slot, name] of links) ({NODE})(from).connect(slot, node, name) }}""", [kind, links])


def queue(page):
    """Run what is on the canvas to its end."""
    page.evaluate("""() => new Promise((done) => {
        app.api.addEventListener("execution_success", done, { once: true }); app.queuePrompt(0, 1) })""")
    page.wait_for_timeout(1000)


def made(server):
    """Each picture's name and the picture."""
    from playwright.sync_api import sync_playwright

    server.call("/api/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": True,
                                  "Comfy.NodeBadge.NodeSourceBadgeMode": "None"})
    with sync_playwright() as play:
        page = pages.browser(play).new_page(viewport={"width": 1400, "height": 1000}, device_scale_factor=1.5)
        pages.begin(page, server.url)
        pages.template(page, "encode_without_training")
        page.evaluate(f"() => ({NODE})('PerfusionDemoPicture').connect(0, ({NODE})('PerfusionSaveConcept'), 'cover')")
        queue(page)
        yield "chart", shot(page, "PerfusionGateStrength", 340, 300)
        yield "save", shot(page, "PerfusionSaveConcept", 340, 140)

        page.evaluate("() => app.refreshComboInNodes()")
        add(page, "PerfusionLoadConcept")
        page.evaluate(f"""() => {{ const [list] = ({NODE})("PerfusionLoadConcept").widgets
            list.value = "ted.safetensors"; list.callback(list.value) }}""")
        page.get_by_text("<ted>, a creature").wait_for()
        yield "load", shot(page, "PerfusionLoadConcept", 340, 200)

        add(page, "PerfusionConceptDoctor", ("PerfusionDemoModel", 0, "model"), ("PerfusionDemoModel", 1, "clip"),
            ("PerfusionLoadConcept", 0, "concept"))
        queue(page)
        shot(page, "PerfusionConceptDoctor", 620, 420)  # its size is set, so the text can be moved
        page.evaluate("""() => { const area = document.querySelector("textarea[aria-label=report]")
            const line = area.scrollHeight / area.value.split("\\n").length
            area.scrollTop = area.value.split("## Concept\\n")[0].split("\\n").length * line - line }""")
        yield "doctor", shot(page, "PerfusionConceptDoctor", 620, 420)
