"""The public E4T files on both hosts, at small widths in SD1.5's own layout: encoded with, and compiled where tuned."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from comfy.clip_vision import ClipVisionModel, convert_to_transformers
from transformers import CLIPVisionConfig, CLIPVisionModel

from perfusion.core import domain_comfy, host_comfy, import_domain, key_lock
from perfusion.core import host_diffusers as hd
from perfusion.core.compile import compiled
from perfusion.core.concept import load
from perfusion.core.domain import dump, parse
from perfusion.core.encode import encode
from perfusion.core.openclip import as_transformers
from perfusion.core.tower import of_transformers, prepare, tokens_of
from perfusion.headless import pictures

import checkpoints
import published_e4t as published
import test_two_hosts

pytestmark = pytest.mark.host

MIMI, CAT = "<mimi>", "cat"
WIDTHS, TEXT, FELT = (32, 64, 64, 64), 64, 4 * 32 + 9 * 64
UNET = dict(block_out_channels=WIDTHS, layers_per_block=2, cross_attention_dim=TEXT, attention_head_dim=(2, 4, 4, 4),
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3))
VISION = dict(image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
              num_attention_heads=2, hidden_act="gelu")
FACTS = published.CONFIG | {"domain_class_token": CAT, "resolution": 128}
PICTURES = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(7))
CAPTIONS = [f"a {a} {b}" for a in ("red", "big", "old", "small") for b in ("cat", "dog", "tree", "house", "hat")]


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    """One model and one tower in both programs, and a folder of the E4T program for them."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints.TINY_UNETS, "sd1", checkpoints.Unet(32, (1, 2, 2, 2), 2, (1, 1, 1, 0), TEXT, None))
        patch.setitem(test_two_hosts.CONFIGS, "sd1", UNET)
        patch.setitem(hd.FAMILIES, TEXT, "sd1")
        patch.setattr(import_domain, "WIDTH", TEXT)
        checkpoints.register()
        parts = checkpoints.load(checkpoints.save_tiny("sd1", folder / "sd1.safetensors"))
        checkpoints.unregister()
        theirs, offsets = published.encoder(d=TEXT, felt=FELT), published.offsets(WIDTHS, TEXT)
        domain, _ = import_domain.pretrained(published.save(folder / "cats", theirs.state_dict(), offsets, FACTS))
        model = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
        state = as_transformers(theirs.clip_vision.state_dict())
        model.load_state_dict({name: state[name.removeprefix("vision_model.")] for name in model.state_dict()})
        (folder / "vision.json").write_text(json.dumps(VISION | {
            "num_channels": 3, "projection_dim": 16, "model_type": "clip_vision_model"}))
        vision = ClipVisionModel(str(folder / "vision.json"))
        missing, unknown = vision.load_sd(convert_to_transformers(dict(theirs.clip_vision.state_dict()), ""))
        assert not unknown and all("visual_projection" in name for name in missing)
        pipe = test_two_hosts.pipeline_of("sd1", *parts[:2])
        yield SimpleNamespace(
            folder=folder, theirs=theirs, offsets=offsets, domain=domain, vision=vision, parts=parts, pipe=pipe,
            model=model, tower=of_transformers(model),
            comfy=host_comfy.ComfyHost(*parts, CAT, folder), diffusers=hd.DiffusersHost(pipe, CAT, folder))


def latents(b=1):
    return torch.randn(b, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def test_the_tower_is_known_for_the_same_in_both_programs(w):
    tower, found = host_comfy.tower_of(w.vision), []
    assert w.domain.tower == tower.hash == w.tower.hash
    for each in tower, w.tower:
        found.append(tokens_of(each, PICTURES, w.domain.encoder.read))
    with torch.no_grad():
        _, patches = w.theirs.clip_vision(prepare(PICTURES, 32))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1][:, 1:], patches[:, 1::2], atol=1e-4, rtol=1e-4)


def test_both_hosts_encode_alike(w):
    seen, found = tokens_of(w.tower, PICTURES, w.domain.encoder.read), []
    for host in w.comfy, w.diffusers:
        with host.training(latents()):
            found.append(encode(host, w.domain, seen, latents(2), CAT, MIMI, draws=3))
    for name in ("embedding", "target_input", "direction", "target_output"):
        torch.testing.assert_close(*(getattr(concept, name) for concept in found), atol=1e-4, rtol=1e-3)
    assert found[0].domain == found[1].domain == w.domain.hash


def test_the_embedding_is_what_the_programs_own_steps_make_of_the_picture(w):
    seen = tokens_of(w.tower, PICTURES[:1], w.domain.encoder.read)
    concept = encode(w.diffusers, w.domain, seen, latents(), CAT, MIMI, seed=5, draws=1)
    unet = copy.deepcopy(w.pipe.unet)
    for name in {name.rpartition(".wo_")[0] for name in w.offsets}:
        for part in "qkv":
            weight = unet.get_submodule(f"{name}.to_{part}").weight
            weight.data = (weight.double() * (1 + published.change(w.offsets, f"{name}.wo_{part}"))).float()
    passed = []  # what the way up gets from the way down
    unet.conv_in.register_forward_hook(lambda block, inputs, answer: passed.append(answer))
    unet.mid_block.register_forward_hook(lambda block, inputs, answer: passed.append(answer))
    for block in unet.down_blocks:
        block.register_forward_hook(lambda block, inputs, answer: passed.extend(answer[1]))
    host = hd.DiffusersHost(w.pipe, CAT, w.folder)
    host.pipe = SimpleNamespace(unet=unet, vae_scale_factor=8)
    context, _ = hd.encode_prompts(w.pipe, [""])
    noise = torch.randn(latents().shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        host.errors(latents(), noise, torch.tensor([0.5]), context, "")
        E = copy.deepcopy(w.theirs).double()(prepare(PICTURES[:1], 32).double(), [x.double() for x in passed])[0]
    assert len(passed) == 13 and E.std() > 0.05
    wanted = w.diffusers.embedding(CAT)["clip_l"] + 0.1 * E
    torch.testing.assert_close(concept.embedding["clip_l"].double(), wanted, atol=1e-5, rtol=1e-4)


def test_comfy_encodes_pictures_with_it_and_refuses_another_tower(w):
    domain = parse(dump(w.domain), "cats")
    rest = *w.parts, w.vision, PICTURES[:1], CAT, MIMI, None, w.folder, lambda done, total: None
    concept = domain_comfy.encode_concept(domain, *rest)
    assert concept.domain == domain.hash and concept.training["steps"] == 0
    assert (concept.embedding["clip_l"] - w.comfy.embedding(CAT)["clip_l"]).abs().max() > 1e-3
    other = CLIPVisionModel(CLIPVisionConfig(**VISION)).state_dict()
    w.vision.load_sd({f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in other.items()})
    with pytest.raises(ValueError, match="another vision tower"):
        domain_comfy.encode_concept(domain, *rest)


@pytest.fixture(scope="module")
def tuned(w):
    """A folder as `tuning_e4t.py` leaves it."""
    folder, r = w.folder / "tuned", torch.Generator().manual_seed(2)
    state = {name: t + 0.1 * t.std() * torch.randn(t.shape, generator=r) if t.numel() > 1 else t
             for name, t in w.pipe.unet.state_dict().items()}
    offsets = published.offsets(WIDTHS, TEXT, seed=1)
    published.save(folder, w.theirs.state_dict(), {}, {"domain_embed_scale": 0.1, "pretrained_args": FACTS})
    (folder / "weight_offsets.pt").unlink()
    torch.save(state | offsets, folder / "unet.pt")
    return SimpleNamespace(folder=folder, state=state, offsets=offsets)


def test_a_tuned_model_is_compiled_to_the_outputs_nearest_to_its_values(w, tuned):
    domain, rest, _ = import_domain.tuned(tuned.folder)
    pipe = copy.copy(w.pipe)
    pipe.unet = copy.deepcopy(w.pipe.unet)
    base = {name: module.weight.detach().clone() for name, module in w.diffusers.projections.items()}
    pipe.unet.load_state_dict(rest)
    host = hd.DiffusersHost(pipe, CAT, w.folder)
    seen = tokens_of(w.tower, PICTURES[:1], domain.encoder.read)
    concept = compiled(host, domain, seen, latents(), MIMI, base)
    assert concept.training["lossy"] and concept.training["imported"] == "mkshing e4t-diffusion"
    assert concept.domain == "" and torch.equal(concept.key_input, concept.target_input)

    context, at = host.encode([frame.replace("{}", MIMI) for frame in host.frames()], MIMI, concept.embedding)
    e, i = context[torch.arange(len(at)), at].double(), concept.target_input.double()
    s = e @ concept.direction.double()
    g = torch.sigmoid((s - key_lock.TRAIN_BIAS) / key_lock.TRAIN_TEMPERATURE)[:, None]
    assert len(concept.target_output) == 16
    for name, o in concept.target_output.items():
        path = next(path for path, module in pipe.unet.named_modules() if module is host.projections[name])
        W = tuned.state[f"{path}.weight"].double() * (1 + published.change(tuned.offsets, path.replace("to_v", "wo_v")))
        left = e @ W.T - (e - s[:, None] * i) @ base[name].double().T
        torch.testing.assert_close(o.double(), torch.linalg.lstsq(g, left).solution[0], atol=1e-4, rtol=1e-4)


def test_the_command_compiles_a_tuned_folder_and_says_that_it_is_lossy(w, tuned, main, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules["core.host_diffusers"].FAMILIES, TEXT, "sd1")
    monkeypatch.setattr(sys.modules["core.import_domain"], "WIDTH", TEXT)
    monkeypatch.setattr(sys.modules["headless.learn"], "FOLDER", w.folder)
    w.pipe.save_pretrained(tmp_path / "base")
    w.model.save_pretrained(tmp_path / "tower")
    picture = pictures.write(tmp_path / "domain.png", PICTURES[:1])
    command = ["convert", str(tuned.folder), "--word", MIMI, "--out", str(tmp_path)]
    assert main(command) == 2
    assert "--model, --picture, --tower" in capsys.readouterr().err
    command += ["--model", str(tmp_path / "base"), "--picture", str(picture), "--tower", str(tmp_path / "tower")]
    assert main(command) == 0, capsys.readouterr().err
    said, made = capsys.readouterr().out, tmp_path / "mimi.safetensors"
    assert "Lossy" in said and f"{made} (" in said and "KB)" in said
    concept = load(made)
    assert concept.superclass == CAT and concept.training["lossy"] and len(concept.target_output) == 16

    state = torch.load(tuned.folder / "unet.pt", weights_only=True)
    torch.save({name: t for name, t in state.items() if name != "conv_in.bias"}, tuned.folder / "unet.pt")
    assert main([*command, "--out", str(tmp_path / "other.safetensors")]) == 2
    assert "does not fit the UNet" in capsys.readouterr().err and not (tmp_path / "other.safetensors").exists()
