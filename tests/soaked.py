"""What artists queue one after the other: graphs for a real server, for each kind of run of the soak, on the demo."""

from collections.abc import Callable
from dataclasses import dataclass

import safetensors.torch
import torch

SIDE, STEPS = 64, 2
THING, WORDS = "creature", ("<mimi>", "<rex>", "<ted>")  # whose pictures come with the pack
ONE, THREE = "a clay model of a <mimi> in the snow", "a <mimi> , a <rex> and a <ted> in the snow"
MODEL, CLIP, VAE, VISION = (["demo", k] for k in range(4))
LORA = "soak.safetensors"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


@dataclass(frozen=True)
class Kind:
    """Makes a graph of a seed. Kinds whose pictures are `like` another's draw the same."""

    graph: Callable[[int], dict]
    like: str = ""
    cancelled: str = ""  # the node that is cancelled at work
    refused: str = ""  # what the sentence says that it gets


def sampled(model, clip, text, seed, steps=STEPS):
    """The stock nodes, from a prompt to a saved picture."""
    return {
        "demo": node("PerfusionDemoModel"),
        "positive": node("CLIPTextEncode", clip=clip, text=text),
        "negative": node("CLIPTextEncode", clip=clip, text=""),
        "empty": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
        "sampler": node("KSampler", model=model, positive=["positive", 0], negative=["negative", 0],
                        latent_image=["empty", 0], seed=seed, steps=steps, cfg=4, sampler_name="euler",
                        scheduler="normal", denoise=1),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=VAE),
        "saved": node("SaveImage", images=["decode", 0], filename_prefix="soak"),
    }


def loaded(word):
    return node("PerfusionLoadConcept", concept_name=f"{word.strip('<>')}.safetensors", embedded="", sha256="")


def applied(words=WORDS[:1], model=MODEL, clip=CLIP, **between):
    """Load and Apply for each word, one after the other; `between` is what a concept comes through, by word."""
    nodes = {}
    for word in words:
        nodes[f"load {word}"] = loaded(word)
        nodes[f"apply {word}"] = node("PerfusionApplyConcept", model=model, clip=clip, concept=[f"load {word}", 0],
                                      edit_negative=False)
        model, clip = [f"apply {word}", 0], [f"apply {word}", 1]
    return nodes, model, clip


def drawn(nodes, model, clip, text, seed, **more):
    return {**nodes, **sampled(model, clip, text, seed, **more)}


def base(seed):
    return sampled(MODEL, CLIP, "a clay model of a creature in the snow", seed)


def one(seed):
    return drawn(*applied(), ONE, seed)


def three(seed, **more):
    return drawn(*applied(WORDS), THREE, seed, **more)


def lora(model, clip):
    return {"lora": node("LoraLoader", model=model, clip=clip, lora_name=LORA, strength_model=0.8, strength_clip=0.8)}


def lora_first(seed):
    nodes, model, clip = applied(model=["lora", 0], clip=["lora", 1])
    return drawn(nodes | lora(MODEL, CLIP), model, clip, ONE, seed)


def lora_last(seed):
    nodes, model, clip = applied()
    return drawn(nodes | lora(model, clip), ["lora", 0], ["lora", 1], ONE, seed)


def dialled(seed, **more):
    """One concept through Gate Strength."""
    graph = one(seed)
    graph["dial"] = node("PerfusionGateStrength", concept=["load <mimi>", 0], strength=0.4, bias_mode="slider",
                         bias=0.7, temperature=0.15, **more)
    graph["apply <mimi>"]["inputs"]["concept"] = ["dial", 0]
    return graph


def timed(seed):
    return dialled(seed, start_percent=0.5, lock="global")


def region(seed):
    return dialled(seed, region=["region", 0]) | {
        "nothing": node("SolidMask", value=0, width=SIDE, height=SIDE),
        "half": node("SolidMask", value=1, width=SIDE // 2, height=SIDE),
        "region": node("MaskComposite", destination=["nothing", 0], source=["half", 0], x=0, y=0, operation="add"),
    }


def sweep(seed):
    nodes = {"load": loaded("<mimi>"),
             "sweep": node("PerfusionGateSweep", model=MODEL, clip=CLIP, concept=["load", 0], strengths=".3, .9")}
    return drawn(nodes, ["sweep", 0], ["sweep", 1], ONE, seed)


def trace(seed):
    graph = three(seed)
    graph["trace"] = node("PerfusionTrace", model=graph["sampler"]["inputs"]["model"])
    graph["sampler"]["inputs"]["model"] = ["trace", 0]
    graph["where"] = node("PerfusionWhere", trace=["trace", 1], samples=["sampler", 0], image=["decode", 0])
    graph["map"] = node("SaveImage", images=["where", 0], filename_prefix="map")
    return graph


def tune(seed, steps=3):
    nodes = {"photo": node("PerfusionDemoPicture", picture="mimi"),
             "tune": node("PerfusionQuickTune", model=MODEL, clip=CLIP, vae=VAE, image=["photo", 0], superclass=THING,
                          word="<mimi>", steps=steps, seed=seed, resolution=SIDE, batch=1, mirror=False,
                          preview_every=2),
             "apply": node("PerfusionApplyConcept", model=MODEL, clip=CLIP, concept=["tune", 0], edit_negative=False)}
    return drawn(nodes, ["apply", 0], ["apply", 1], ONE, seed)


def twice(seed):
    graph = drawn(*applied(WORDS[:2]), ONE, seed)
    graph["apply <rex>"]["inputs"]["concept"] = ["load <mimi>", 0]
    return graph


def two_words(seed):
    graph = tune(seed)
    graph["tune"]["inputs"]["superclass"] = "red creature"
    return graph


KINDS = {
    "base": Kind(base),
    "one concept": Kind(one),
    "three concepts": Kind(three),
    "LoRA, then concept": Kind(lora_first),
    "concept, then LoRA": Kind(lora_last, like="LoRA, then concept"),
    "strength": Kind(dialled),
    "part of sampling": Kind(timed),
    "region": Kind(region),
    "sweep": Kind(sweep),
    "trace": Kind(trace),
    "tune": Kind(tune),
    "tune, found on disk": Kind(tune, like="tune"),
    "tune, cancelled": Kind(lambda seed: tune(seed, steps=2000), cancelled="tune"),
    "sampling, cancelled": Kind(lambda seed: three(seed, steps=1000), cancelled="sampler"),
    "word twice": Kind(twice, refused="Two of the applied concepts are called <mimi>"),
    "superclass of two words": Kind(two_words, refused="one plain word"),
}


def encoded(word):
    """A picture of the pack becomes a concept in a file."""
    name = word.strip("<>")
    return {
        "demo": node("PerfusionDemoModel"),
        "domain": node("PerfusionLoadDomain", domain_name="creature.safetensors"),
        "photo": node("PerfusionDemoPicture", picture=name),
        "encode": node("PerfusionEncodeConcept", domain=["domain", 0], model=MODEL, clip=CLIP, vae=VAE,
                       clip_vision=VISION, image=["photo", 0], superclass=THING, word=word),
        "save": node("PerfusionSaveConcept", concept=["encode", 0], name=name),
    }


def save_lora(path):
    """A random LoRA of every attention projection of the demo's UNet and text encoder, by the names of the host."""
    from perfusion.core import demo_comfy
    from perfusion.headless.learn import DEMO

    generator, lora = torch.Generator().manual_seed(11), {}
    for prefix, model in ("", demo_comfy.load_model(DEMO)), ("text_encoders.", demo_comfy.load_clip(DEMO).patcher):
        for name, weight in model.model.state_dict().items():
            if name.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight", "_proj.weight")):
                rows, columns = weight.shape
                name = prefix + name.removesuffix(".weight")
                lora[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) * 0.1
                lora[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) * 0.1
    safetensors.torch.save_file(lora, path)
