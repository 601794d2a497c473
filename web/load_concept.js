// Load Perfusion Concept: the concept may travel inside the workflow. `embedded` holds it then, as base64, and `sha256`
// says which bytes are meant: those embedded, or those of the file that `concept_name` names. Both are hidden.
import { app } from "../../scripts/app.js"
import { ask, bytesOf, headerOf } from "./concepts.mjs"
import { button, el, panel } from "./panel.mjs"
import { setting } from "./settings.mjs"
import { t } from "./texts.mjs"

const likeness = () =>
  t(
    "Everyone who gets this workflow, or a picture made with it, then has the concept too and can make pictures of it. " +
      "If it is a person, that is their likeness.",
  )

class Carrier {
  constructor(node) {
    this.node = node
    const of = (name) => node.widgets.find((widget) => widget.name === name)
    this.name = of("concept_name")
    this.embedded = of("embedded")
    this.sha256 = of("sha256")
    for (const widget of [this.embedded, this.sha256]) {
      widget.hidden = true // the canvas renderer reads this one, Nodes 2.0 the other
      widget.options.hidden = true // set in place: Nodes 2.0 holds on to the object
    }
    this.text = el("div")
    this.text.setAttribute("role", "status")
    this.buttons = el("div")
    this.buttons.style.cssText = "display:flex;flex-wrap:wrap;gap:6px"
    this.cover = el("img", { alt: t("The concept's cover"), hidden: true })
    this.cover.style.cssText = "max-width:100%;max-height:96px;object-fit:contain;align-self:flex-start"
    this.cover.onload = () => node.setDirtyCanvas?.(true, true) // its height is known now
    panel(node, "travels").append(this.cover, this.text, this.buttons)
    this.asked = 0

    const picked = this.name.callback
    this.name.callback = (...args) => {
      picked?.apply(this.name, args)
      this.mean("", "") // another file is meant from now on
      this.look().then((facts) => facts && setting.of(setting.embed) && this.carry(facts))
    }
    const onAdded = node.onAdded
    node.onAdded = function (...args) {
      onAdded?.apply(this, args)
      setTimeout(() => node.perfusionCarrier.look()) // by then a loaded workflow has set the widgets
    }
    const configured = node.onConfigure
    node.onConfigure = function (...args) {
      configured?.apply(this, args)
      node.perfusionCarrier.vouch()
    }
    const connected = node.onConnectionsChange
    node.onConnectionsChange = function (...args) {
      connected?.apply(this, args)
      if (node.graph) setTimeout(() => node.perfusionCarrier.look())
    }
  }

  /** Sets what is meant. */
  mean(embedded, sha256) {
    this.embedded.value = embedded
    this.sha256.value = sha256
  }

  /** An embedded concept's file need not be here: listed on this node, it is no missing model to the host. */
  vouch() {
    const { values } = this.name.options
    if (this.embedded.value && !values.includes(this.name.value)) this.name.options.values = [...values, this.name.value]
  }

  say(text, ...buttons) {
    this.text.textContent = text
    this.buttons.replaceChildren(...buttons)
    this.node.setDirtyCanvas?.(true, true)
  }

  /** Shows what is meant, notes the file's hash where the workflow holds none, and answers the facts of that file. */
  async look() {
    const asked = ++this.asked
    this.cover.hidden = true
    if (!this.node.graph) return
    if (this.embedded.value) return this.lookInside()
    if (this.node.inputs.some((input) => input.widget?.name === "concept_name" && input.link != null)) {
      this.mean("", "")
      return this.say(t("Another node names the file, so its hash is not kept."))
    }
    const name = this.name.value
    if (!name) return this.say(t("No concept yet. Drop a concept's file on the canvas, or tune one."))
    try {
      const facts = await ask({ name })
      if (asked !== this.asked || !this.node.graph) return
      if (!this.sha256.value) this.mean("", facts.sha256)
      this.cover.hidden = !facts.cover
      if (facts.cover) this.cover.src = `data:image/jpeg;base64,${facts.cover}`
      if (this.sha256.value === facts.sha256) {
        this.say(
          t("{word}, a {superclass}, for {base}", facts),
          this.does(t("Embed in workflow"), () => this.embed(facts)),
        )
        return facts
      }
      this.say(
        t("The workflow was made with another {name} than the one here.", { name }),
        this.does(t("Use this file"), () => this.mean("", facts.sha256)),
      )
    } catch (error) {
      if (asked === this.asked) this.say(error.message)
    }
  }

  lookInside() {
    try {
      const bytes = bytesOf(this.embedded.value)
      const { word, superclass } = headerOf(bytes)
      this.say(
        t("embedded: {word}, a {superclass}, {size} KB. It travels in this workflow and in every picture made with it.", {
          word,
          superclass,
          size: (bytes.length / 1024).toFixed(0),
        }),
        this.does(t("Save to my concepts"), () => this.save(bytes, word)),
        this.does(t("Take out of workflow"), () => this.takeOut()),
      )
    } catch {
      this.say(t("embedded: damaged. Choose a file in the list instead."))
    }
  }

  /** A button whose act is one step of undo and is followed by a look; a sentence that it throws is shown. */
  does(label, act) {
    return button(label, async () => {
      app.canvas.emitBeforeChange()
      try {
        if ((await act()) !== false) await this.look()
      } catch (error) {
        this.say(error.message, ...this.buttons.children)
      }
      app.canvas.emitAfterChange()
    })
  }

  async embed({ embedded, embedded_sha256 }) {
    const agreed = await app.extensionManager.dialog.confirm({ title: t("Embed in workflow"), message: likeness() })
    if (agreed) this.mean(embedded, embedded_sha256)
  }

  /** Embeds without asking, for whoever has chosen that in the settings. */
  carry({ embedded, embedded_sha256 }) {
    this.mean(embedded, embedded_sha256)
    return this.look()
  }

  async save(bytes, word) {
    const name = this.name.value || word.replace(/[<>]/g, "")
    const saved = await ask({ name }, { method: "POST", body: bytes })
    await app.refreshComboInNodes()
    this.name.value = saved.name
    this.say(
      t("Saved as {name}. It still travels in this workflow.", saved),
      this.does(t("Take out of workflow"), () => this.takeOut()),
    )
    return false
  }

  async takeOut() {
    const facts = await ask({ name: this.name.value }).catch(() => null)
    if (facts?.embedded_sha256 !== this.sha256.value) {
      throw new Error(t("It is not among your concepts, so it would be lost. Save it first, or choose a file in the list."))
    }
    this.mean("", facts.sha256)
  }
}

app.registerExtension({
  name: "perfusion.loadConcept",
  nodeCreated(node) {
    if (node.constructor.comfyClass !== "PerfusionLoadConcept") return
    node.perfusionCarrier = new Carrier(node)
    node.setSize([Math.max(node.computeSize()[0], 280), node.computeSize()[1]])
  },
  refreshComboInNodes() {
    for (const node of app.graph.nodes) node.perfusionCarrier?.look()
  },
})
