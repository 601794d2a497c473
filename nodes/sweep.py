"""Gate Sweep: one prompt at many strengths, for any sampler."""

from comfy_api.latest import io

from ..core.host_versions import known
from ..core.sweep import sweep
from .schema import CATEGORY, Concept

STRENGTHS = "0, .25, .5, .75, 1"


class GateSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionGateSweep",
            display_name="Gate Sweep",
            category=CATEGORY,
            description="Applies a concept at several strengths. What comes after it, any sampler too, runs once for "
                        "each, so that the pictures can be compared.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2.x or SDXL, also fine-tuned or with LoRAs."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                Concept.Input("concept", tooltip="The concept to compare. Its own strength or raw gate is not read."),
                io.String.Input("strengths", default=STRENGTHS,
                                tooltip="Strengths from 0 to 1 with commas between them, or a range: 0-1 [5] is five "
                                        "of them, 0-1 (+.25) goes in steps."),
                Concept.Input("concept_b", optional=True,
                              tooltip="A second concept: every strength of it with every strength of the first."),
                io.String.Input("strengths_b", default=STRENGTHS, optional=True,
                                tooltip="The strengths of the second concept, one for each row of the grid."),
            ],
            outputs=[
                io.Model.Output(display_name="model", is_output_list=True,
                                tooltip="A list of models, one for each picture. Connect it as if it were one."),
                io.Clip.Output(display_name="clip", is_output_list=True,
                               tooltip="A list of text encoders in the same order. Encode all prompts with it."),
                io.String.Output(display_name="label", is_output_list=True,
                                 tooltip="What is in each picture, such as <mimi> .5"),
            ],
            **known(io.Schema, search_aliases=["xy plot", "xyz plot", "compare", "grid", "strength test"]),
        )

    @classmethod
    def execute(cls, model, clip, concept, strengths, concept_b=None, strengths_b=STRENGTHS) -> io.NodeOutput:
        return io.NodeOutput(*sweep(model, clip, concept, strengths, concept_b, strengths_b))
