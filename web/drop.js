// A concept's file dropped on the canvas is put among your concepts, and a Load node with it appears. A picture opens
// the workflow it was made with, as ever; with Shift held, only the concepts that travel in it are taken out of it.
import { app } from "../../scripts/app.js"
import { ask, textsOf } from "./concepts.mjs"

const KIND = "PerfusionLoadConcept"

/** Adds a Load node with these values of its widgets. */
function add([x, y], values) {
  const node = window.LiteGraph.createNode(KIND)
  for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name]
  node.pos = [x, y]
  app.canvas.graph.add(node)
}

/** Whether a concept's file became a node; other files are not ours. */
async function takeFile(file, place) {
  const head = await file.slice(0, 2 ** 16).text() // a checkpoint is too large to be read whole
  if (!head.includes('"perfusion-concept/')) return false
  const { name, sha256 } = await ask({ name: file.name }, { method: "POST", body: file })
  await app.refreshComboInNodes()
  add(place, { concept_name: name, sha256 })
  return true
}

/** Whether the picture's workflow carried concepts; each became a node. */
async function takePicture(file, [x, y]) {
  const { workflow } = await textsOf(file)
  const { nodes = [], definitions } = JSON.parse(workflow ?? "{}")
  const all = [...nodes, ...(definitions?.subgraphs ?? []).flatMap((graph) => graph.nodes)]
  const carried = all.filter((node) => node.type === KIND && node.widgets_values?.[1])
  carried.forEach(({ widgets_values: [concept_name, embedded, sha256] }, i) =>
    add([x + 40 * i, y + 40 * i], { concept_name, embedded, sha256 }),
  )
  return carried.length > 0
}

async function dropped(event) {
  const files = [...(event.dataTransfer?.files ?? [])]
  const concepts = files.every((file) => file.name.endsWith(".safetensors"))
  const pictures = event.shiftKey && files.every((file) => file.type === "image/png")
  if (!files.length || !(concepts || pictures) || event.target.closest("[role=dialog]")) return
  event.preventDefault()
  event.stopImmediatePropagation()
  const [x, y] = app.canvas.convertEventToCanvasOffset(event)
  app.canvas.emitBeforeChange()
  for (const [i, file] of files.entries()) {
    try {
      const taken = await (pictures ? takePicture : takeFile)(file, [x + 40 * i, y + 40 * i])
      if (!taken) await app.handleFile(file) // the host's to open, or to say what is wrong with it
    } catch (error) {
      app.extensionManager.toast.add({ severity: "error", summary: file.name, detail: error.message })
    }
  }
  app.canvas.emitAfterChange()
}

app.registerExtension({
  name: "perfusion.drop",
  setup() {
    document.addEventListener("drop", dropped, true) // ahead of the host's, which takes every file for a workflow
  },
})
