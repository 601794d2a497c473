"""Fidelity Curve: what a concept's dial gives and takes, measured, and its strength set by that."""

from comfy_api.latest import io, ui

from ..core.fidelity import PROMPTS
from ..core.fidelity_comfy import measure
from ..core.host_versions import known
from .fidelity_sheet import nearest, sheet
from .schema import CATEGORY, Concept
from .sweep import STRENGTHS
from .watch import drawing, jpeg, tell


class FidelityCurve(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionFidelityCurve",
            display_name="Fidelity Curve",
            category=CATEGORY,
            description="Draws a concept at several strengths, measures likeness and obedience to the prompt, and sets "
                        "its strength to the most likeness that leaves the prompt its due.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2.x or SDXL, also fine-tuned or with LoRAs."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.ClipVision.Input("clip_vision", tooltip="What looks at the pictures: any CLIP vision, SigLIP or "
                                                           "DINOv2 model that Load CLIP Vision takes."),
                Concept.Input("concept", tooltip="The concept to measure. Its own strength or raw gate is not read."),
                io.Image.Input("image", tooltip="The picture that it was learnt from, or a batch of them. Likeness is "
                                                "measured against it."),
                io.String.Input("strengths", default=STRENGTHS,
                                tooltip="Strengths from 0 to 1 with commas between them, 0 among them, or a range: "
                                        "0-1 [5] is five of them, 0-1 (+.25) goes in steps."),
                io.String.Input("prompts", default="\n".join(PROMPTS), multiline=True,
                                tooltip="Prompts to draw, two or more, one on a line, with {} where the word goes. "
                                        "Each should ask for much: an easy one is obeyed at any strength."),
                io.Int.Input("seed", default=0, min=0, max=2**53, control_after_generate=False,
                             tooltip="The noise of the first prompt; each further one has the next. It is the same "
                                     "at all strengths."),
                io.Int.Input("resolution", default=512, min=64, max=2048, step=64,
                             tooltip="Pictures are drawn with about this many pixels squared, in the shape of the "
                                     "first image. 512 for SD1.5, 1024 for SDXL."),
            ],
            outputs=[
                Concept.Output(display_name="concept", tooltip="The concept with its curve, at the strength found. "
                                                               "Save it; Gate Strength keeps that strength in auto."),
                io.Image.Output(display_name="sheet", tooltip="The pictures, a row for each prompt and a column "
                                                              "for each strength, and the curve below."),
            ],
            hidden=[io.Hidden.unique_id],
            **known(io.Schema, has_intermediate_output=True,
                    search_aliases=["auto strength", "best strength", "knee", "clip score", "compare"]),
        )

    @classmethod
    def execute(cls, model, clip, vae, clip_vision, concept, image, strengths, prompts, seed,
                resolution) -> io.NodeOutput:
        node = cls.hidden.unique_id
        measured, pictures = measure(model, clip, vae, clip_vision, concept, image, strengths, prompts, seed,
                                     resolution, drawing(node))
        curve = measured.fidelity
        at = nearest(curve)
        if not measured.cover:
            measured = measured.replace(cover=jpeg(pictures[at, :1]))
        tell(node, f"{measured.word}: strength {curve.knee:g}")
        shown = sheet(curve, pictures)
        return io.NodeOutput(measured, shown, ui=ui.PreviewImage(shown, cls=cls))
