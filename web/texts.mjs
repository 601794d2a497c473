// What the pack's own controls say, in the language of the host's settings where locales/<language>/main.json has it.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { setting } from "./settings.mjs"

let found = {}

/** A text with {names} filled in. Texts are written in English where they are used, and are their own keys. */
export const t = (english, values = {}) =>
  (found[english] ?? english).replace(/{(\w+)}/g, (gap, name) => values[name] ?? gap)

app.registerExtension({
  name: "perfusion.texts",
  async init() {
    const all = await (await api.fetchApi("/i18n")).json()
    found = all[setting.of("Comfy.Locale")]?.perfusion ?? {}
  },
})
