"""The small model that comes with the pack."""

from comfy_api.latest import io

from ..core.demo_comfy import load
from .folders import DEMO
from .schema import CATEGORY


class DemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionDemoModel",
            display_name="Load Demo Model",
            category=CATEGORY,
            description="The creature world: a very small model that comes with the pack, to try everything at once, "
                        "on a CPU too. It draws creatures, houses and flowers at 128 pixels and knows few words.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The small diffusion model."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, which knows few words."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder."),
                io.ClipVision.Output(display_name="clip_vision", tooltip="Its vision model, for Encode Concept."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load(DEMO))
