// The server's list of concepts, and a concept's file read in the browser.
import { api } from "../../scripts/api.js"
import { t } from "./texts.mjs"

/** The server's answer to a request for a concept (nodes/routes.py). Throws an Error with the server's sentence. */
export async function ask(query, options) {
  const answer = await api.fetchApi(`/perfusion/concept?${new URLSearchParams(query)}`, options)
  const facts = await answer.json().catch(() => ({ error: t("The server answered with {status}.", answer) }))
  if (facts.error) throw new Error(facts.error)
  return facts
}

/** The bytes of base64. */
export const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))

/** The facts in a concept file's own header. */
export function headerOf(bytes) {
  const length = Number(new DataView(bytes.buffer).getBigUint64(0, true))
  return JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length))).__metadata__
}

/** The texts in a PNG by their keyword, among them the `workflow` that it was made with. */
export async function textsOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer())
  const [view, decoder, texts] = [new DataView(bytes.buffer), new TextDecoder(), {}]
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at)
    const chunk = bytes.subarray(at + 8, at + 8 + length)
    if (decoder.decode(bytes.subarray(at + 4, at + 8)) === "tEXt") {
      const end = chunk.indexOf(0)
      texts[decoder.decode(chunk.subarray(0, end))] = decoder.decode(chunk.subarray(end + 1))
    }
    at += 12 + length
  }
  return texts
}
