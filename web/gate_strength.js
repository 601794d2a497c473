// Gate Strength: the gate's curve at the present strength, and after a run each word of the prompt as a chip shaded by
// how far the gate opens for it. The server tells in a run how similar each word is to the concept, as it read them at
// that run's strength; all else is computed here, so it is live while the dial is dragged.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { fidelity } from "./fidelity.mjs"
import { dialled, gate } from "./gate.mjs"
import { el, panel } from "./panel.mjs"
import { t } from "./texts.mjs"

const [LEFT, RIGHT, TOP, BOTTOM] = [-0.25, 1.25, 8, 62] // similarities at the chart's ends; its pixels from the top
const WIDTH = 240
const DIAL = ["strength", "bias_mode", "bias", "temperature"] // the widgets that the curve follows
const COLOUR = "#e08a1e"
const CARRIED = 0.75 // the strength of a concept that nothing was measured of
const X = (similarity) => (WIDTH * (Math.min(RIGHT, Math.max(LEFT, similarity)) - LEFT)) / (RIGHT - LEFT)
const Y = (opening) => BOTTOM - (BOTTOM - TOP) * opening

const charts = new Set()
const keyOf = ({ word, energy }) => `${word} ${energy}` // the energy tells two concepts of one word apart
const heard = {} // by concept, by the node that encodes: what the concept's gate sees of that node's prompt

class Chart {
  constructor(node) {
    this.node = node
    this.drawing = el("div")
    this.caption = el("div")
    this.measured = el("div")
    this.prompts = el("div")
    this.prompts.style.cssText = "display:flex;flex-direction:column;gap:6px"
    panel(node, "chart").append(this.drawing, this.measured, this.caption, this.prompts)

    for (const widget of node.widgets) {
      if (!DIAL.includes(widget.name)) continue
      const moved = widget.callback
      widget.callback = (...args) => {
        moved?.apply(widget, args)
        this.draw()
      }
    }
    this.chain("onAdded", () => {
      charts.add(this)
      setTimeout(() => {
        if (!node.graph) return
        this.draw() // by now a loaded workflow has set the widgets
        this.ran(app.nodeOutputs?.[node.id]) // of a run before another tab was shown
      })
    })
    this.chain("onRemoved", () => charts.delete(this))
    this.chain("onExecuted", (output) => this.ran(output))
  }

  chain(name, act) {
    const before = this.node[name]
    this.node[name] = function (...args) {
      before?.apply(this, args)
      act(...args)
    }
  }

  /** A run has told which concept passes here. */
  ran(output) {
    if (!output?.perfusion_gate) return
    this.concept = output.perfusion_gate[0]
    this.draw()
  }

  /** The gate as the widgets say; as the last run had it where another node turns the dial. */
  present() {
    const linked = this.node.inputs.some((input) => DIAL.includes(input.widget?.name) && input.link != null)
    if (linked && this.concept) return this.concept
    const values = Object.fromEntries(this.node.widgets.map((widget) => [widget.name, widget.value]))
    if (values.bias_mode === "auto") values.strength = this.concept?.carried ?? CARRIED
    const dial = dialled(values)
    return { ...dial, off: dial.off || this.concept?.blank }
  }

  mode() {
    return this.node.widgets.find((widget) => widget.name === "bias_mode").value
  }

  draw() {
    const { bias, temperature, scale, off } = this.present()
    const open = (similarity, weight = 1) => (off ? 0 : Math.min(1, gate(similarity, bias, temperature) * scale * weight))
    const said = this.said()
    this.drawing.innerHTML = curve(open, said.flatMap((prompt) => prompt.words), bias, off)
    const found = this.concept?.fidelity
    this.measured.innerHTML = found ? fidelity(found, this.mode() === "raw" ? null : scale) : ""
    this.caption.textContent = [this.auto(), this.sentence(off, said)].filter(Boolean).join(" ")
    this.prompts.replaceChildren(...said.map((prompt) => chips(prompt, open)))
    this.node.setDirtyCanvas?.(true, true)
  }

  /** The prompts of the last runs that say the concept's word. */
  said() {
    const prompts = this.concept ? Object.values(heard[keyOf(this.concept)] ?? {}) : []
    return prompts.filter(({ by, weight }) => weight && (by.includes(":") || app.graph.getNodeById(by)))
  }

  /** Which strength is in use where the concept brings it along. */
  auto() {
    if (this.mode() !== "auto") return ""
    if (!this.concept) return t("Auto: the strength that the concept carries.")
    return t("Auto: strength {strength}, which the concept carries.", { strength: this.concept.carried.toFixed(2) })
  }

  sentence(off, said) {
    if (this.concept?.blank) {
      return t("Nothing was encoded: no picture looked like a {superclass}. This is the plain model.", this.concept)
    }
    if (off && this.concept) return t("Strength 0: the plain model, with the word {superclass}.", this.concept)
    if (off) return t("Strength 0: the plain model.")
    if (said.length) return t("How far each word opens it, in percent:")
    if (this.concept && heard[keyOf(this.concept)]) {
      return t("No prompt says {word}, so the gate stays shut.", this.concept)
    }
    return t("Queue once to see how far each word of the prompt opens it.")
  }
}

/**
 * The curve as SVG, low even before its node has given it a width, with a dot for every word. Only numbers go into it,
 * and texts of our own.
 */
function curve(open, words, bias, off) {
  const points = Array.from({ length: 81 }, (_, i) => LEFT + ((RIGHT - LEFT) * i) / 80)
  const line = points.map((s) => `${X(s).toFixed(1)},${Y(open(s)).toFixed(1)}`).join(" ")
  const dots = words.map(([, s]) => `<circle cx="${X(s).toFixed(1)}" cy="${Y(open(s)).toFixed(1)}" r="3"/>`).join("")
  const half = off ? "" : `<path d="M${X(bias)} ${TOP}V${BOTTOM}" stroke="currentColor" stroke-dasharray="2 3"/>`
  const label = off
    ? t("The gate is shut.")
    : t("The gate is half open at similarity {bias}.", { bias: bias.toFixed(2) })
  return `<svg viewBox="0 0 ${WIDTH} 80" width="100%" role="img" aria-label="${label}"
    style="display:block;max-height:120px">
    <path d="M0 ${BOTTOM}H${WIDTH}M0 ${TOP}H${WIDTH}" stroke="currentColor" opacity=".25"/>${half}
    <polyline points="${line}" fill="none" stroke="${COLOUR}" stroke-width="2"/>
    <g fill="${COLOUR}" stroke="currentColor" stroke-width=".5">${dots}</g>
    <g font-size="9" fill="currentColor"><text x="2" y="${TOP + 9}">${t("open")}</text>
    <text x="2" y="${BOTTOM - 3}">${t("shut")}</text><text x="${X(0)}" y="75" text-anchor="middle">${t("unlike")}</text>
    <text x="${X(1)}" y="75" text-anchor="middle">${t("the concept")}</text></g></svg>`
}

/** A prompt's words, each shaded by its gate. */
function chips({ words, weight }, open) {
  const row = el("div")
  row.style.cssText = "display:flex;flex-wrap:wrap;gap:3px"
  for (const [word, similarity] of words) {
    const percent = Math.round(100 * open(similarity, weight))
    const chip = el("span", {
      title: t("similarity {similarity}, gate open {percent} %", { similarity: similarity.toFixed(2), percent }),
    })
    chip.append(word || t("(rest)"), el("small", { textContent: ` ${percent}` }))
    chip.style.cssText =
      "padding:1px 5px;border:1px solid var(--border-color);border-radius:5px;" +
      `background:color-mix(in srgb, ${COLOUR} ${(0.5 * percent).toFixed(0)}%, var(--comfy-input-bg))`
    row.append(chip)
  }
  return row
}

/** What a gate sees of a prompt has come. */
function hear(prompt) {
  const key = keyOf(prompt)
  heard[key] = { ...heard[key], [prompt.by]: prompt }
  for (const chart of charts) chart.draw()
}

app.registerExtension({
  name: "perfusion.gateStrength",
  setup() {
    api.addEventListener("perfusion.gate", ({ detail }) => hear(detail))
    // of prompts that the server need not encode again, Apply tells at the end of a run
    api.addEventListener("executed", ({ detail }) => {
      for (const prompts of detail.output?.perfusion_heard ?? []) Object.values(prompts).forEach(hear)
    })
  },
  nodeCreated(node) {
    if (node.constructor.comfyClass !== "PerfusionGateStrength") return
    new Chart(node)
    node.setSize([Math.max(node.computeSize()[0], 280), node.computeSize()[1]])
  },
  onNodeOutputsUpdated(outputs) {
    for (const chart of charts) chart.ran(outputs[chart.node.id])
  },
})
