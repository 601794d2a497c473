"""The small model that comes with the pack, and pictures of its world."""

from comfy_api.latest import io

from ..core.demo_comfy import ALL, load, load_picture, names
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


class DemoPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionDemoPicture",
            display_name="Load Demo Picture",
            category=CATEGORY,
            description="A picture of a creature, from the pack itself, to try the demo model with. For a picture of "
                        "your own put Load Image in its place.",
            inputs=[io.Combo.Input("picture", options=[*names(DEMO), ALL],
                                   tooltip="Which creature. With all it is a batch, one of each.")],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture of 128 pixels, or the batch.")],
        )

    @classmethod
    def execute(cls, picture) -> io.NodeOutput:
        return io.NodeOutput(load_picture(DEMO, picture))
