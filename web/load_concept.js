// Load Perfusion Concept: `embedded` and `sha256` travel in the workflow file and are not for hands, so they are hidden.
import { app } from "../../scripts/app.js"

app.registerExtension({
  name: "perfusion.loadConcept",
  nodeCreated(node) {
    if (node.constructor.comfyClass !== "PerfusionLoadConcept") return
    for (const widget of node.widgets ?? []) {
      if (widget.name !== "embedded" && widget.name !== "sha256") continue
      widget.hidden = true // the canvas renderer reads this one, Nodes 2.0 the other
      widget.options = { ...widget.options, hidden: true }
    }
    node.setSize?.(node.computeSize())
  },
})
