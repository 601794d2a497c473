"""Concept Doctor: what is wrong, as a report to paste."""

from comfy_api.latest import io

from ..core.doctor_comfy import examine
from ..core.host_versions import known
from . import folders
from .schema import CATEGORY, Concept, Domain


class ConceptDoctor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionConceptDoctor",
            display_name="Concept Doctor",
            category=CATEGORY,
            description="Looks at what is connected and says what is wrong: files, families, words, numbers, memory "
                        "and versions. The report is to be pasted where you ask for help.",
            inputs=[
                io.Model.Input("model", optional=True, tooltip="The model that the concept is for."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder that prompts are encoded with."),
                Concept.Input("concept", optional=True, tooltip="The concept that does not do what it should."),
                Domain.Input("domain", optional=True, tooltip="The domain that does not do what it should."),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The report, in Markdown. Your home folder is "
                                                                     "written ~ in it.")],
            is_output_node=True,
            **known(io.Schema, search_aliases=["debug", "diagnose", "check", "report", "help"]),
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return float("nan")  # never what it was: files and free memory change while the graph does not

    @classmethod
    def execute(cls, model=None, clip=None, concept=None, domain=None) -> io.NodeOutput:
        text = examine(model, clip, concept, domain, folders.found(), folders.models())
        return io.NodeOutput(text, ui={"text": (text,)})
