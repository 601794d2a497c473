// The pack's settings by their ids.
import { app } from "../../scripts/app.js"

export const PREVIEW_EVERY = 10 // steps, as in nodes/learn.py

export const setting = {
  embed: "Perfusion.Concepts.EmbedByDefault",
  preview: "Perfusion.QuickTune.PreviewEvery",
  of: (id) => app.extensionManager.setting.get(id),
}
