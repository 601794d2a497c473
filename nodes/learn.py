"""Quick Tune: a picture becomes a concept."""

from comfy_api.latest import io, ui

from ..core.concept import dump
from ..core.host_versions import known
from ..core.once_more import FACT
from ..core.quick_tune import quick_tune
from ..core.tune import STEPS, STEPS_FROM_CONCEPT, TEMPLATES, Tuning, advised
from . import folders
from .schema import CATEGORY, Concept
from .watch import Watch, tell

PREVIEW_EVERY = 10  # steps: four pictures in fifty, for a tenth of the time or so


class QuickTune(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        default = Tuning()
        return io.Schema(
            node_id="PerfusionQuickTune",
            display_name="Quick Tune",
            category=CATEGORY,
            description="Learns a concept from one or several pictures of one thing.",
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on: SD1.5, SD2.x or SDXL."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input("image", tooltip="The thing to learn; a batch of pictures shows several sides of it."),
                io.String.Input("superclass", default="cat",
                                tooltip="The plain word for its kind: cat, person, toy, house. One common word."),
                io.String.Input("word", default="<mimi>",
                                tooltip="The new word for it in prompts, in angle brackets."),
                io.Int.Input("steps", default=0, min=0, max=2000,
                             tooltip="How long to learn. More is more likeness, until the prompt is ignored. 0 is what "
                                     f"is advised: {STEPS_FROM_CONCEPT} with a concept connected, {STEPS} without."),
                io.Int.Input("seed", default=0, min=0, max=2**53, control_after_generate=False,
                             tooltip="The same seed and settings give the same concept."),
                io.Int.Input("resolution", default=default.resolution, min=64, max=2048, step=64,
                             tooltip="Pictures are scaled to about this many pixels squared, their shape kept. "
                                     "512 for SD1.5, 1024 for SDXL; less is faster and needs less memory."),
                io.Int.Input("batch", default=default.batch, min=1, max=64,
                             tooltip="Samples in each step. More is steadier and slower; memory stays the same."),
                io.Boolean.Input("mirror", default=False,
                                 tooltip="Learn from mirrored copies too. Off for text, logos and uneven faces."),
                io.Mask.Input("mask", optional=True,
                              tooltip="Where the thing is. What lies outside is not learnt."),
                io.String.Input("captions", optional=True, force_input=True,
                                tooltip="Captions of your own, one on a line, with {} where the word goes."),
                Concept.Input("concept", optional=True,
                              tooltip="Go on from this concept, such as what Encode Concept made, instead of from the "
                                      "superclass word."),
                io.Int.Input("preview_every", default=PREVIEW_EVERY, min=0, max=2000, optional=True,
                             **known(io.Int.Input, advanced=True),
                             tooltip="After so many steps a picture is drawn of what is learnt by then. 0 draws none, "
                                     "which is a little faster; what is learnt is the same."),
            ],
            outputs=[Concept.Output(display_name="concept", tooltip="For Apply and Save Perfusion Concept.")],
            hidden=[io.Hidden.unique_id],
            **known(io.Schema, has_intermediate_output=True,  # the sheet is there again after a reload
                    search_aliases=["personalize", "train", "dreambooth", "textual inversion", "one photo"]),
        )

    @classmethod
    def execute(cls, model, clip, vae, image, superclass, word, steps, seed, resolution, batch, mirror,
                mask=None, captions=None, concept=None, preview_every=PREVIEW_EVERY) -> io.NodeOutput:
        node = cls.hidden.unique_id
        watch = Watch(node, image)
        templates = TEMPLATES if captions is None else tuple(c.strip() for c in captions.splitlines() if c.strip())
        settings = Tuning(steps or advised(concept), batch, seed, resolution, mirror, templates=templates)

        def keep(concept):
            steps = concept.training["steps"]
            path = folders.save(concept, f"{word.strip('<>')}-stopped-at-{steps}")
            tell(node, f"Stopped. What was learnt in {steps} steps is in {path.name}")
            return str(path)

        learnt, before, after = quick_tune(model, clip, vae, image, superclass, word, settings, mask, concept,
                                           folders.models(), watch, keep, preview_every)
        again = f". Memory ran out: {learnt.training[FACT]}" if FACT in learnt.training else ""
        tell(node, f"{learnt.word}: {learnt.training['steps']} steps, {len(dump(learnt)) / 1024:.1f} KB{again}")
        return io.NodeOutput(learnt, ui=ui.PreviewImage(watch.result(before, after), cls=cls))
