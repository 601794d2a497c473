// A concept's fidelity curve (core/fidelity.py) as SVG: likeness and obedience over strength, and where the dial is.
import { t } from "./texts.mjs"

const [LEFT, RIGHT, TOP, BOTTOM] = [8, 232, 14, 58] // pixels of 240 × 72
const COLOURS = { likeness: "#e08a1e", obedience: "#3d9bd6" } // as in nodes/fidelity_sheet.py

/** The curve with the dial at `strength`; null marks none. Only numbers go into it, and texts of our own. */
export function fidelity(curve, strength) {
  const values = [0, 1, ...curve.likeness, ...curve.obedience].map(Number)
  const [low, high] = [Math.min(...values), Math.max(...values)]
  const x = (s) => (LEFT + (RIGHT - LEFT) * Number(s)).toFixed(1)
  const y = (value) => (BOTTOM - ((BOTTOM - TOP) * (Number(value) - low)) / (high - low)).toFixed(1)
  const line = (name) => {
    const points = curve.strengths.map((s, k) => [x(s), y(curve[name][k])])
    return `<polyline points="${points.map((point) => point.join(",")).join(" ")}" fill="none"
      stroke="${COLOURS[name]}" stroke-width="2"/>
      <g fill="${COLOURS[name]}">${points.map(([a, b]) => `<circle cx="${a}" cy="${b}" r="2.5"/>`).join("")}</g>`
  }
  const mark =
    strength === null
      ? ""
      : `<path class="dial" d="M${x(strength)} ${TOP}V${BOTTOM}" stroke="currentColor"/>
        <text x="${x(strength)}" y="68" text-anchor="middle">${Number(strength).toFixed(2)}</text>`
  return `<svg viewBox="0 0 240 72" width="100%" role="img" aria-label="${t("Likeness and obedience over strength.")}"
    style="display:block;max-height:108px"><g font-size="9" fill="currentColor">
    <path d="M${LEFT} ${y(0)}H${RIGHT}M${LEFT} ${y(1)}H${RIGHT}" stroke="currentColor" opacity=".25"/>
    ${line("likeness")}${line("obedience")}${mark}
    <text x="${LEFT}" y="9" fill="${COLOURS.likeness}">${t("likeness")}</text>
    <text x="${RIGHT}" y="9" text-anchor="end" fill="${COLOURS.obedience}">${t("obedience")}</text></g></svg>`
}
