// Concept Doctor: the report stands on the node, to be read and copied. It is not part of the workflow's file.
import { app } from "../../scripts/app.js"
import { button, el } from "./panel.mjs"
import { t } from "./texts.mjs"

const ID = "PerfusionConceptDoctor"

function show(node, output) {
  const widget = node.widgets?.find(({ name }) => name === "report")
  if (widget && output?.text) widget.value = output.text[0]
}

app.registerExtension({
  name: "perfusion.conceptDoctor",
  nodeCreated(node) {
    if (node.constructor.comfyClass !== ID) return
    const paper = el("textarea", { className: "comfy-multiline-input", readOnly: true, ariaLabel: t("report") })
    paper.style.cssText = "flex:1;width:100%;height:auto;min-height:0;resize:none"
    const copy = button(t("Copy the report"), () => {
      paper.select()
      document.execCommand("copy") // the newer way is closed to a page that a server on the network gives without TLS
    })
    const sheet = el("div", {}, paper, copy)
    sheet.style.cssText = "display:flex;flex-direction:column;gap:6px;font:12px/1.4 Inter,Arial,sans-serif"
    const widget = node.addDOMWidget("report", "perfusion_report", sheet, {
      serialize: false, // this one keeps it out of what is queued, the other out of the workflow's file
      getValue: () => paper.value,
      setValue: (text) => (paper.value = text),
      getMinHeight: () => 240,
    })
    widget.serialize = false
    node.setSize?.([Math.max(node.size[0], 420), Math.max(node.size[1], 360)])
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      show(node, output)
    }
  },
  onNodeOutputsUpdated(outputs) {
    // after a switch of tabs; inside a subgraph the executed event alone tells the node
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.graph.getNodeById(id)
      if (node?.constructor.comfyClass === ID) show(node, output)
    }
  },
})
