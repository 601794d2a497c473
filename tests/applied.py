"""Models with random concepts on them, and the textbook formula that their pictures are measured by."""

from contextlib import contextmanager
from types import SimpleNamespace

import comfy.sample
import pytest
import torch

from perfusion.core import apply as applying
from perfusion.core.concept import Concept
from perfusion.core.covariance import PACKAGED
from perfusion.core.host_comfy import encode_chunks
from perfusion.core.key_lock import direction, invert, second_moment
from perfusion.core.prompt import Token, encoder, superclass_ids, with_word

KINDS = ("sd1", "sd2", "sd2-v", "sdxl", "sd1-inpaint")
PLACES = {"sd1": 14, "sd2": 30, "sd2-v": 30, "sdxl": 22, "sd1-inpaint": 14}  # keys and values
TINY = 1e-4  # of the edit's effect
BATCHED = 1e-5  # of the picture: what one batch of two and two of one may differ by


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def world(tiny):
    """A kind's model, clip and C⁻¹, and three concepts of it. Nothing may change the model, so all tests share it."""
    made = {}

    def get(kind="sd1"):
        if kind not in made:
            made[kind] = world_of(*tiny(kind)[:2])
        return made[kind]

    return get


def world_of(model, clip):
    captions = PACKAGED.read_text(encoding="utf-8").splitlines()[::32]
    encodings, _ = encode_chunks(clip.encode_from_tokens, [clip.tokenize(line) for line in captions])
    w = SimpleNamespace(model=model, clip=clip, inverse=invert(second_moment(encodings)[0], ridge=0.01))
    w.cat, w.dog, w.toy = (
        random_concept(w, word, superclass, seed)
        for seed, (word, superclass) in enumerate((("<mimi>", "cat"), ("<rex>", "dog"), ("<bot>", "toy")))
    )
    return w


def random_concept(w, word, superclass, seed) -> Concept:
    """A concept whose vector is near the superclass word's, and whose values are W i* plus as much noise."""
    generator, ids, embedding = torch.Generator().manual_seed(seed), superclass_ids(w.clip, superclass), {}
    for name, i in ids.items():
        v = encoder(w.clip, name).transformer.get_input_embeddings().weight[i].float()
        embedding[name] = v + v.std() * torch.randn(v.shape, generator=generator)
    taught = with_word(w.clip, word, Token(embedding, ids))
    tokens = taught.tokenize(f"a photo of a {word}")
    at = [torch.is_tensor(t) for t, _ in next(iter(tokens.values()))[0]].index(True)
    target_input = taught.encode_from_tokens(tokens)[0, at]
    along, energy = direction(w.inverse, target_input)
    target_output = {}
    for name, module in projections(w.model).items():
        if name.endswith("to_v"):
            o = module.weight.float() @ target_input
            target_output[name] = o + o.std() * torch.randn(o.shape, generator=generator)
    return Concept(
        base=applying.base_of(w.model), superclass=superclass, word=word, embedding=embedding,
        target_input=target_input, key_input=w.clip.encode(f"a photo of a {superclass}")[0, at],
        direction=along.float(), target_output=target_output, energy=energy, covariance="c" * 32,
        strength=0.5 + seed / 10,
    )


def projections(model):
    return applying.projections(model.model.diffusion_model)


def apply(w, *concepts, model=None, clip=None, **options):
    model, clip = model or w.model, clip or w.clip
    for concept in concepts:
        model, clip = applying.apply(model, clip, concept, **options)
    return model, clip


def encode(clip, prompt):
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def sample(model, positive, negative, steps=2, batch=1):
    latent = torch.zeros(batch, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 7)
    return comfy.sample.sample(model, noise, steps, 5.0, "euler", "normal", positive, negative, latent, seed=7,
                               disable_pbar=True)


@contextmanager
def textbook(w, concepts, named, model=None):
    """The projections of a plain model answer by the formula, in fp64 and from W itself, while the block is open.

    `named` is a list of (conditioning, weight per concept): which rows name which concepts. Nothing of the edit under
    test is used, neither its marks nor its directions: C⁻¹ is the one that the concepts were made under.
    """
    I = torch.stack([c.target_input for c in concepts]).double()  # noqa: E741
    G = I @ w.inverse @ I.T
    scale = torch.tensor([c.strength for c in concepts], dtype=torch.float64)
    rows = [(cond[0][0][0], weights) for cond, weights in named]

    def answer(name, module, x, plain):
        W, out = module.weight.double(), plain.clone()
        for b, row in enumerate(x):
            weights = next((weights for cond, weights in rows if torch.equal(cond, row)), (0,) * len(concepts))
            on = [j for j, weight in enumerate(weights) if weight]
            if not on:
                continue
            p = row.double() @ w.inverse @ I[on].T
            s = p / G.diagonal()[on]
            g = torch.sigmoid((s - 0.30) / 0.10) * torch.tensor([weights[j] for j in on], dtype=torch.float64)
            c = torch.linalg.solve(G[on][:, on], p.T).T
            g, c = g * scale[on], c * scale[on]
            o = torch.stack([concepts[j].target_output[name].double() if name.endswith("to_v")
                             else W @ concepts[j].key_input.double() for j in on])
            out[b] = (row.double() - c @ I[on]) @ W.T + g @ o
        return out

    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: answer(name, module, args[0], out))
        for name, module in projections(model or w.model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def off_by(picture, expected, of):
    """How far a picture is from the expected one, in units of what `of` (a picture) differs from it by."""
    return ((picture - expected).abs().max() / (of - expected).abs().max()).item()


def near(picture, expected, tolerance=BATCHED):
    return ((picture - expected).abs().max() / expected.abs().max()).item() < tolerance


def swapped(model):
    return [name for name, module in model.model.named_modules() if "forward" in vars(module)]
