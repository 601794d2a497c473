"""Trace Concepts and Where It Acted: the one before the sampler, the other after it."""

from comfy_api.latest import io

from ..core.host_versions import known
from ..core.where_comfy import traced
from .heat import maps
from .schema import CATEGORY, Trace


class TraceConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionTrace",
            display_name="Trace Concepts",
            category=CATEGORY,
            description="Notes where in the picture each concept acts while the sampler draws it. The picture stays "
                        "the same, bit for bit; sampling takes somewhat longer.",
            inputs=[io.Model.Input("model", tooltip="From Apply Perfusion Concept.")],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The same model, for the sampler."),
                Trace.Output(display_name="trace", tooltip="For Where It Acted, behind the sampler."),
            ],
            **known(io.Schema, search_aliases=["attention map", "heatmap", "daam"]),
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(*traced(model))


class WhereItActed(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionWhere",
            display_name="Where It Acted",
            category=CATEGORY,
            description="Shows where in the picture each concept acted, and which words of the prompt opened its gate.",
            inputs=[
                Trace.Input("trace", tooltip="From Trace Concepts, which the sampler's model came through."),
                io.Latent.Input("samples", tooltip="What the sampler made; by it the run is found again."),
                io.Image.Input("image", optional=True, tooltip="The decoded picture, to lay the map over."),
            ],
            outputs=[io.Image.Output(display_name="map", tooltip="A map for each picture and each concept.")],
            **known(io.Schema, search_aliases=["attention map", "heatmap", "daam", "where did it bind"]),
        )

    @classmethod
    def execute(cls, trace, samples, image=None) -> io.NodeOutput:
        return io.NodeOutput(maps(trace.of(samples["samples"]), image))
