// A box of our own under a node's widgets, in both renderers: plain HTML, so the keyboard reaches it and themes colour
// it. Not in the workflow file and not in the prompt.

const MARGIN = 10

/** An element with properties and children, `el("b", { title: "x" }, "text", other)`. */
export function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}

/** A button that runs `act`. */
export function button(label, act) {
  const element = el("button", { type: "button", textContent: label, onclick: act })
  element.style.cssText =
    "padding:4px 10px;border:1px solid var(--border-color);border-radius:6px;cursor:pointer;font:inherit;" +
    "background:var(--comfy-input-bg);color:var(--input-text)"
  return element
}

/** Adds the box to a node and returns it; what is put into it sets its height. */
export function panel(node, name) {
  const inner = el("div")
  inner.style.cssText =
    "display:flex;flex-direction:column;gap:6px;font:12px/1.4 Inter,Arial,sans-serif;color:var(--input-text)"
  const outer = el("div", {}, inner)
  outer.style.overflow = "hidden"
  const height = () => (inner.offsetHeight || 60) + 2 * MARGIN
  const widget = node.addDOMWidget(name, "perfusion", outer, {
    serialize: false, // in the prompt
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: height,
    getMaxHeight: height,
  })
  widget.serialize = false // in the workflow file
  return inner
}
