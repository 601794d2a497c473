"""Concept files in int8: their size, what comes back of them, and what a picture loses. `-s` prints the losses."""

import pytest
import safetensors.torch
import torch

from perfusion.core.concept import dump, parse
from perfusion.core.int8 import SCALES

from concepts import SHAPES, learnt, metadata_of

LARGEST = {"sd1": 24, "sd2": 26, "sdxl": 112, "creature": 4}  # KB


def losses(was, now) -> list[float]:
    """Of each projection how far the value output is from what it was, over what it was."""
    assert was.target_output.keys() == now.target_output.keys()
    return [((o - now.target_output[name]).norm() / o.norm()).item() for name, o in was.target_output.items()]


@pytest.mark.parametrize("base", SHAPES)
def test_a_file_in_int8_is_small_and_only_its_value_outputs_are_other(base):
    full, data = dump(learnt(base)), dump(learnt(base, precision="int8"))
    print(f"{base}: {len(full) / 1024:.1f} KB, in int8 {len(data) / 1024:.1f} KB")
    assert len(data) <= LARGEST[base] * 1024 and metadata_of(data)["format"] == "perfusion-concept/2"
    was, now = (safetensors.torch.load(d) for d in (full, data))
    assert now.keys() - was.keys() == {SCALES} and now[SCALES].shape == (len(SHAPES[base][0]),)
    for name, tensor in was.items():
        assert now[name].dtype == torch.int8 if name.startswith("target_output.") else torch.equal(now[name], tensor)


@pytest.mark.parametrize("base", SHAPES)
def test_each_projection_comes_back_within_about_a_hundredth(base):
    found = losses(learnt(base), parse(dump(learnt(base, precision="int8")), "mimi"))
    print(f"{base}: relative error of a projection {sum(found) / len(found):.4f} in the mean, {max(found):.4f} at most")
    assert max(found) < 0.012


@pytest.mark.parametrize("base", SHAPES)
def test_what_is_read_and_written_again_is_the_same_file(base):
    data = dump(learnt(base, precision="int8", target_output={
        name: o * 10.0**k for k, (name, o) in enumerate(list(learnt(base).target_output.items())[:5], -4)}))
    again = parse(data, "mimi")
    assert again.precision == "int8" and dump(again) == data
    assert parse(dump(again.replace(precision="fp16")), "mimi").precision == "fp16"


def test_outputs_of_nothing_and_of_one_large_value_come_back():
    outputs = {"a.attn2.to_v": torch.zeros(4), "b.attn2.to_v": torch.tensor([6e4, 1.0, -6e4, 0.0])}
    back = parse(dump(learnt(precision="int8", target_output=outputs)), "mimi").target_output
    assert torch.equal(back["a.attn2.to_v"], torch.zeros(4))
    torch.testing.assert_close(back["b.attn2.to_v"], outputs["b.attn2.to_v"], rtol=0.004, atol=250)


@pytest.mark.host
def test_the_demo_draws_nearly_the_same_picture():
    from pathlib import Path

    import comfy.sample
    import numpy as np
    from PIL import Image

    from perfusion.core import demo_comfy
    from perfusion.core import domain as domains
    from perfusion.core.apply import apply
    from perfusion.core.domain_comfy import encode_concept

    demo = Path(__file__).parent.parent / "demo"
    with torch.inference_mode():
        model, clip, vae, vision = demo_comfy.load(demo)
        photo = torch.from_numpy(np.array(Image.open(demo / "pictures" / "mimi.png"), dtype=np.float32) / 255)[None]
        domain = domains.load(demo / "domains" / "creature.safetensors")
        concept = encode_concept(domain, model, clip, vae, vision, photo, "creature", "<mimi>", None, demo,
                                 lambda done, total: None)
        latents = torch.zeros(4, vae.latent_channels, 16, 16)
        noise, pictures = comfy.sample.prepare_noise(latents, 0), []
        kept = [parse(dump(concept.replace(precision=precision)), "mimi") for precision in ("fp16", "int8")]
        for one in (*kept, concept.at(0)):
            edited, words = apply(model, clip, one)
            said = [words.encode_from_tokens_scheduled(words.tokenize(t)) for t in ("a <mimi> in the snow", "")]
            made = comfy.sample.sample(edited, noise, 12, 4.0, "euler", "normal", *said, latents, seed=0,
                                       disable_pbar=True)
            pictures.append(vae.decode(made))
    loss, effect = ((p - pictures[0]).abs().mean().item() for p in pictures[1:])
    print(f"relative error {max(losses(*kept)):.4f} at most; a pixel is {loss:.4f} from fp16's, of 0..1, where the "
          f"concept has moved it by {effect:.4f}")
    assert loss < 0.01 and loss < effect / 10
