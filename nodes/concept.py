"""Load, Gate Strength, Apply and Save: what an artist does with a concept."""

from comfy_api.latest import io

from ..core import concept as files
from ..core.acting import Acting
from ..core.apply import apply
from ..core.host_versions import known
from ..core.key_lock import TEMPERATURE
from . import folders
from .schema import CATEGORY, Concept
from .watch import gate, gate_listener, jpeg, tell


class LoadConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        # web/load_concept.js hides the two strings, which are the workflow file's to carry
        return io.Schema(
            node_id="PerfusionLoadConcept",
            display_name="Load Perfusion Concept",
            category=CATEGORY,
            description="Loads a concept from models/perfusion/concepts or output/perfusion.",
            inputs=[
                io.Combo.Input("concept_name", options=folders.names(),
                               tooltip="The concept's file. What was just saved is in the list after pressing R."),
                io.String.Input("embedded", default="",
                                tooltip="The concept itself, where it travels inside the workflow. Leave it as it is."),
                io.String.Input("sha256", default="",
                                tooltip="Which file is meant, so that no other of the same name takes its place."),
            ],
            outputs=[
                Concept.Output(display_name="concept", tooltip="For Gate Strength and Apply Perfusion Concept."),
                io.String.Output(display_name="word", tooltip="The word that stands for it in a prompt, <mimi>."),
            ],
            **known(io.Schema, search_aliases=["personalize", "subject", "textual inversion", "faceid"]),
        )

    @classmethod
    def validate_inputs(cls, concept_name, embedded=""):
        if embedded or concept_name in folders.names():
            return True
        return f"The concept '{concept_name}' is not in the list. Put its file into models/perfusion/concepts."

    @classmethod
    def fingerprint_inputs(cls, concept_name, embedded="", sha256=""):
        return embedded, sha256, "" if embedded else str(folders.stamp(folders.find(concept_name)))

    @classmethod
    def execute(cls, concept_name, embedded="", sha256="") -> io.NodeOutput:
        if embedded:
            concept = files.unpack(embedded, sha256)
        else:
            concept = files.load(folders.find(concept_name), sha256)
        return io.NodeOutput(concept, concept.word)


class GateStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        advanced = known(io.Float.Input, advanced=True)
        return io.Schema(
            node_id="PerfusionGateStrength",
            display_name="Gate Strength",
            category=CATEGORY,
            description="How much the picture is the concept, and how much it obeys the rest of the prompt.",
            inputs=[
                Concept.Input("concept", tooltip="From Load Perfusion Concept or Quick Tune."),
                io.Float.Input("strength", default=0.75, min=0, max=1, step=0.01, round=0.01,
                               display_mode=io.NumberDisplay.slider,
                               tooltip="Higher is more likeness, lower more obedience to the prompt. "
                                       "0 is the plain model with the superclass word."),
                io.Combo.Input("bias_mode", options=["slider", "raw", "auto"], default="slider", **advanced,
                               tooltip="slider: strength sets the gate. raw: the paper's bias and temperature do. "
                                       "auto: the strength that the concept carries, as Fidelity Curve has set it."),
                io.Float.Input("bias", default=0.7, min=-2, max=3, step=0.01, round=0.001, **advanced,
                               tooltip="Raw mode: the gate's bias. It runs the other way: higher is less concept."),
                io.Float.Input("temperature", default=TEMPERATURE, min=0.01, max=2, step=0.01, round=0.001, **advanced,
                               tooltip="Raw mode: how softly the gate opens around the bias."),
                io.Float.Input("start_percent", optional=True, default=0.0, min=0, max=1, step=0.01, round=0.001,
                               **advanced, tooltip="From which part of the sampling on the concept acts. Before, its "
                                                   "word is the superclass word and the model is the plain one."),
                io.Float.Input("end_percent", optional=True, default=1.0, min=0, max=1, step=0.01, round=0.001,
                               **advanced, tooltip="Up to which part of the sampling the concept acts. After, its word "
                                                   "is the superclass word and the model is the plain one."),
                io.Combo.Input("lock", options=["local", "global"], default="local", optional=True, **advanced,
                               tooltip="local: the concept's own word attends as its superclass word does. global: the "
                                       "whole prompt does, for richer scenes; it bears a higher strength."),
                io.Mask.Input("region", optional=True,
                              tooltip="Where in the picture the concept may act, stretched over it. Elsewhere its word "
                                      "is the superclass word. A step takes longer with it."),
            ],
            outputs=[Concept.Output(display_name="concept", tooltip="The same concept at this strength.")],
            **known(io.Schema, has_intermediate_output=True),  # told again by runs that find it done
        )

    @classmethod
    def execute(cls, concept, strength, bias_mode, bias, temperature, start_percent=0.0, end_percent=1.0,
                lock="local", region=None) -> io.NodeOutput:
        carried = concept.strength
        concept = concept.raw(bias, temperature) if bias_mode == "raw" else concept.at(
            carried if bias_mode == "auto" else strength)
        region = region if region is None else region.reshape(-1, *region.shape[-2:])
        concept = concept.replace(acting=Acting(start_percent, end_percent, lock, region))
        return io.NodeOutput(concept, ui={"perfusion_gate": (gate(concept, carried),)})


class ApplyConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionApplyConcept",
            display_name="Apply Perfusion Concept",
            category=CATEGORY,
            description="Teaches MODEL and CLIP the concept's word. Chain it for several concepts in one picture.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2.x or SDXL, also fine-tuned or with LoRAs."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                Concept.Input("concept", tooltip="From Load Perfusion Concept, Gate Strength or Quick Tune."),
                io.Boolean.Input("edit_negative", default=False, **known(io.Boolean.Input, advanced=True),
                                 tooltip="Edit prompts without the word too, such as the negative one, as the "
                                         "research code does. Off leaves them as they are."),
                io.Boolean.Input("keep_apart", default=True, optional=True, **known(io.Boolean.Input, advanced=True),
                                 tooltip="Where a prompt names several concepts, each acts in the part of the picture "
                                         "that its word is drawn in, so that they do not mix. Off for a concept that "
                                         "belongs everywhere, such as a style."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the concept."),
                io.Clip.Output(display_name="clip", tooltip="Encode all prompts with this one: it knows the word."),
            ],
            **known(io.Schema, has_intermediate_output=True),
        )

    @classmethod
    def execute(cls, model, clip, concept, edit_negative=False, keep_apart=True) -> io.NodeOutput:
        concept, (heard, prompts) = concept.kept_apart(keep_apart), gate_listener(concept)
        # `prompts` fills while prompts are encoded, later; the host sends it at the end of runs that need not encode
        return io.NodeOutput(*apply(model, clip, concept, edit_negative, heard), ui={"perfusion_heard": (prompts,)})


class SaveConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionSaveConcept",
            display_name="Save Perfusion Concept",
            category=CATEGORY,
            description="Writes the concept to output/perfusion, where Load Perfusion Concept finds it.",
            inputs=[
                Concept.Input("concept", tooltip="What Quick Tune learnt."),
                io.String.Input("name", default="concept",
                                tooltip="The file's name. It is numbered where another concept has it already."),
                io.Image.Input("cover", optional=True,
                               tooltip="A small picture stored in the file, shown in the model library."),
                io.Combo.Input("precision", options=[*files.FORMATS.values()], default="fp16", optional=True,
                               tooltip="int8: a file of two thirds the size, with a picture that is very nearly that "
                                       "of fp16."),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, concept, name, cover=None, precision="fp16") -> io.NodeOutput:
        concept = concept.replace(precision=precision)
        path = folders.save(concept if cover is None else concept.replace(cover=jpeg(cover)), name)
        text = f"Saved {path.name}, {path.stat().st_size / 1024:.1f} KB"
        tell(cls.hidden.unique_id, text)
        return io.NodeOutput(ui={"text": (text,)})
