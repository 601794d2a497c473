// Concept Doctor: the report stands on the node, to be read and copied. It is not part of the workflow's file.
import { app } from "../../scripts/app.js"
import { ComfyWidgets } from "../../scripts/widgets.js"

const ID = "PerfusionConceptDoctor"

function show(node, output) {
  const text = output?.text?.[0]
  const widget = node.widgets?.find(({ name }) => name === "report")
  if (text && widget) widget.value = text
}

app.registerExtension({
  name: "perfusion.conceptDoctor",
  nodeCreated(node) {
    if (node.constructor.comfyClass !== ID) return
    const { widget } = ComfyWidgets.STRING(node, "report", ["STRING", { multiline: true }], app)
    widget.serialize = false // in the workflow's file; the option keeps it out of what is queued
    widget.options = { ...widget.options, serialize: false, read_only: true }
    if (widget.element) widget.element.readOnly = true
    node.setSize?.([Math.max(node.size[0], 420), Math.max(node.size[1], 320)])
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      show(node, output)
    }
  },
  onNodeOutputsUpdated(outputs) {
    // after a switch of tabs or a reload; a node inside a subgraph has the subgraph's id before its own
    for (const [place, output] of Object.entries(outputs)) {
      const node = app.graph?.getNodeById?.(place.split(":").pop())
      if (node?.constructor.comfyClass === ID) show(node, output)
    }
  },
})
