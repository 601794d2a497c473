// The pack's page in the host's settings. Names and tooltips in other languages: locales/<language>/settings.json.
import { app } from "../../scripts/app.js"
import { PREVIEW_EVERY, setting } from "./settings.mjs"
import { el } from "./panel.mjs"
import { t } from "./texts.mjs"

app.registerExtension({
  name: "perfusion.settings",
  settings: [
    {
      id: "Perfusion.Folders",
      category: ["Perfusion", "Concepts", "Folders"],
      name: "Where concepts and domains are found",
      type: () => el("div", { textContent: t("models/perfusion and output/perfusion; extra_model_paths.yaml adds others") }),
      defaultValue: "",
    },
    {
      id: setting.embed,
      category: ["Perfusion", "Concepts", "Embed"],
      name: "Embed concepts in workflows by default",
      tooltip:
        "A concept that is chosen in Load Perfusion Concept then travels in the workflow and in every picture made with " +
        "it. Everyone who gets one has the concept too. If it is a person, that is their likeness.",
      type: "boolean",
      defaultValue: false,
    },
    {
      id: setting.preview,
      category: ["Perfusion", "Quick Tune", "Preview"],
      name: "Preview every n steps, in new Quick Tune nodes",
      tooltip: "A picture of what is learnt by then. 0 draws none, which is a little faster.",
      type: "number",
      attrs: { min: 0, max: 2000, step: 1 },
      defaultValue: PREVIEW_EVERY,
    },
  ],
  nodeCreated(node) {
    if (node.constructor.comfyClass !== "PerfusionQuickTune") return
    // a workflow that is loaded sets its own afterwards
    node.widgets.find(({ name }) => name === "preview_every").value = setting.of(setting.preview)
  },
})
