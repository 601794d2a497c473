"""Domains: Load Domain, Train Domain, and Encode Concept, which needs one."""

from comfy_api.latest import io

from ..core import domain as files
from ..core.domain_comfy import encode_concept, train_domain
from ..core.encode import far
from ..core.host_versions import known
from ..core.school import Schooling
from . import folders
from .schema import CATEGORY, Concept, Domain
from .watch import Watch, tell


class LoadDomain(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionLoadDomain",
            display_name="Load Domain",
            category=CATEGORY,
            description="Loads a domain, which knows a whole family of things, from models/perfusion/domains.",
            inputs=[io.Combo.Input("domain_name", options=folders.names(folders.DOMAINS),
                                   tooltip="The file. What was just trained is in the list after pressing R.")],
            outputs=[Domain.Output(display_name="domain", tooltip="For Encode Concept.")],
        )

    @classmethod
    def validate_inputs(cls, domain_name):
        if domain_name in folders.names(folders.DOMAINS):
            return True
        return f"The domain '{domain_name}' is not in the list. Put its file into models/perfusion/domains."

    @classmethod
    def fingerprint_inputs(cls, domain_name):
        return str(folders.stamp(folders.find(domain_name, folders.DOMAINS)))

    @classmethod
    def execute(cls, domain_name) -> io.NodeOutput:
        return io.NodeOutput(files.load(folders.find(domain_name, folders.DOMAINS)))


class TrainDomain(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        default = Schooling()
        return io.Schema(
            node_id="PerfusionTrainDomain",
            display_name="Train Domain",
            category=CATEGORY,
            description="Learns what a family of things has in common, from many pictures of it. For small jobs; "
                        "`python -m headless train-domain` is for large ones.",
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on: SD1.5, SD2.x or SDXL."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.ClipVision.Input("clip_vision", tooltip="What looks at the pictures, usually CLIP-ViT-H-14. The "
                                                           "domain needs the same one ever after."),
                io.Image.Input("images", tooltip="Pictures of many things of one kind, one thing in each."),
                io.String.Input("superclass", default="cat",
                                tooltip="The plain word for their kind: cat, person, toy."),
                io.String.Input("name", default="domain", tooltip="The file's name, in output/perfusion/domains."),
                io.Int.Input("steps", default=1000, min=1, max=1_000_000,
                             tooltip="The paper takes 30,000 for faces, with thousands of pictures."),
                io.Int.Input("seed", default=0, min=0, max=2**53, control_after_generate=False,
                             tooltip="The same seed, pictures and settings give the same domain."),
                io.Int.Input("resolution", default=512, min=64, max=2048, step=64,
                             tooltip="Pictures are scaled to about this many pixels squared, their shape kept."),
                io.Int.Input("batch", default=default.batch, min=1, max=256,
                             tooltip="Pictures in each step. More is steadier and slower; memory stays the same."),
            ],
            outputs=[Domain.Output(display_name="domain", tooltip="For Encode Concept. It is saved already.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, vae, clip_vision, images, superclass, name, steps, seed, resolution,
                batch) -> io.NodeOutput:
        node = cls.hidden.unique_id
        watch = Watch(node, images)

        def keep(domain):
            path = folders.save_domain(domain, f"{name}-stopped-at-{domain.training['steps']}")
            tell(node, f"Stopped. What was learnt is in {path.name}")

        learnt = train_domain(model, clip, vae, clip_vision, images, superclass, Schooling(steps, batch, seed=seed),
                              resolution, folders.models(), watch.captions, watch.school, keep)
        path = folders.save_domain(learnt, name)
        text = f"Saved {path.name}, {path.stat().st_size / 2**20:.1f} MB"
        tell(node, text)
        return io.NodeOutput(learnt, ui={"text": (text,)})


class EncodeConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerfusionEncodeConcept",
            display_name="Encode Concept",
            category=CATEGORY,
            description="A picture becomes a concept at once, without training, by what a domain knows of its family. "
                        "Quick Tune goes on from it.",
            inputs=[
                Domain.Input("domain", tooltip="From Load Domain or Train Domain."),
                io.Model.Input("model", tooltip="The base model that the domain was trained on."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.ClipVision.Input("clip_vision", tooltip="The CLIP vision model that the domain was trained with."),
                io.Image.Input("image", tooltip="The thing; a batch of pictures shows several sides of it."),
                io.String.Input("superclass", default="cat", tooltip="The plain word for its kind, the domain's."),
                io.String.Input("word", default="<mimi>",
                                tooltip="The new word for it in prompts, in angle brackets."),
                io.Mask.Input("mask", optional=True, tooltip="Where the thing is. What lies outside is left out."),
            ],
            outputs=[Concept.Output(display_name="concept", tooltip="For Apply Perfusion Concept, or Quick Tune.")],
            hidden=[io.Hidden.unique_id],
            **known(io.Schema, search_aliases=["personalize", "one photo", "ip adapter", "faceid", "zero shot"]),
        )

    @classmethod
    def execute(cls, domain, model, clip, vae, clip_vision, image, superclass, word, mask=None) -> io.NodeOutput:
        node = cls.hidden.unique_id
        learnt = encode_concept(domain, model, clip, vae, clip_vision, image, superclass, word, mask, folders.models(),
                                Watch(node, image).captions)
        if far(learnt):
            tell(node, far(learnt))
        return io.NodeOutput(learnt)
