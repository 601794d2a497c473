"""The model that comes with the pack: small, whole, and with the covariance that its text encoder asks for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perfusion.core import domain as domains
from perfusion.core import host_diffusers
from perfusion.core.concept import load
from perfusion.core.host_diffusers import DiffusersHost

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"


@pytest.fixture
def copied(tmp_path):
    return Path(shutil.copytree(DEMO, tmp_path / "demo"))


def size(*names):
    return sum(path.stat().st_size for name in names for path in (DEMO / name).rglob("*") if path.is_file())


def test_its_files_are_small():
    assert size("unet", "vae", "text_encoder", "tokenizer", "scheduler") <= 16 * 2**20
    assert size("covariance") <= 2**20 and size("vision", "domains") <= 10 * 2**20


def test_its_covariance_needs_no_captions_to_be_read(copied):
    before = sorted(copied.rglob("*"))
    host = DiffusersHost(host_diffusers.load(copied), "creature", copied, lambda done, total: pytest.fail("was read"))
    inverse, _, facts = host.inverse_covariance()
    assert sorted(copied.rglob("*")) == before
    assert inverse.shape == (128, 128) and facts["ridge"] == 0


def test_its_autoencoder_gives_pictures_back():
    pipe = host_diffusers.load(DEMO)
    picture = torch.from_numpy(np.array(Image.open(DEMO / "pictures" / "mimi.png"), dtype=np.float32) / 255)
    x = picture.movedim(-1, 0)[None] * 2 - 1
    with torch.no_grad():
        back = pipe.vae.decode(pipe.vae.encode(x).latents).sample
    assert ((back - x) / 2).square().mean() < 0.01
    assert DiffusersHost(pipe, "creature", DEMO).latents(picture[None]).std() == pytest.approx(1, abs=0.3)


def test_how_it_was_trained_is_written_beside_it():
    facts = json.loads((DEMO / "training.json").read_text())
    assert {"settings", "scaling_factor", "torch"} <= set(facts)


def test_the_demo_learns_a_creature_and_draws_a_sheet(main, tmp_path, capsys):
    assert main(["demo", "--steps", "2", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "mimi.safetensors") in said and "KB" in said and str(tmp_path / "demo.png") in said
    concept = load(tmp_path / "mimi.safetensors")
    assert (concept.base, concept.word, concept.training["steps"]) == ("creature", "<mimi>", 2)
    assert concept.domain == domains.load(DEMO / "domains" / "creature.safetensors").hash


def test_encode_and_tune_do_what_the_demo_does(main, tmp_path, capsys):
    picture, encoded = str(DEMO / "pictures" / "mimi.png"), str(tmp_path / "encoded.safetensors")
    assert main(["demo", "--steps", "2", "--out", str(tmp_path / "demo")]) == 0
    assert main(["encode", str(DEMO), picture, "--domain", str(DEMO / "domains" / "creature.safetensors"), "--tower",
                 str(DEMO / "vision"), "--out", encoded]) == 0
    assert main(["tune", str(DEMO), picture, "--superclass", "creature", "--concept", encoded, "--steps", "2",
                 "--out", str(tmp_path / "tuned")]) == 0
    ours, theirs = (load(path / "mimi.safetensors") for path in (tmp_path / "demo", tmp_path / "tuned"))
    assert ours.domain == theirs.domain == load(encoded).domain
    for name, o in ours.target_output.items():
        # what was encoded went through a file, and a first step of AdamW is as long for a small gradient as for a large
        assert (o - theirs.target_output[name]).abs().mean() < 0.1 * o.abs().mean()


def test_tune_and_apply_do_the_same_by_hand(main, tmp_path, capsys):
    picture = str(DEMO / "pictures" / "mimi.png")
    assert main(["tune", str(DEMO), picture, "--superclass", "creature", "--word", "<bo>", "--steps", "2",
                 "--out", str(tmp_path)]) == 0
    concept = str(tmp_path / "bo.safetensors")
    made = []
    for strength in ("0", "1"):
        assert main(["apply", str(DEMO), concept, "--prompt", "a <bo> in the snow", "--steps", "3", "--strength",
                     strength, "--out", str(tmp_path / strength)]) == 0
        made.append((tmp_path / strength / "0.png").read_bytes())
    assert made[0] != made[1]
    plain = host_diffusers.pictures(host_diffusers.load(DEMO), ["a creature in the snow"], steps=3, seeds=[0])
    found = torch.from_numpy(np.array(Image.open(tmp_path / "0" / "0.png"), dtype=np.float32) / 255)[None]
    torch.testing.assert_close(found, plain, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("arguments, says", [
    (["tune", "nowhere", "{png}", "--superclass", "creature"], "not a folder of a diffusers pipeline"),
    (["tune", "{demo}", "{txt}", "--superclass", "creature"], "not a picture"),
    (["tune", "{demo}", "{png}", "{wide}", "--superclass", "creature"], "2 sizes"),
    (["tune", "{demo}", "{png}", "--superclass", "dragon"], "does not know it"),
    (["tune", "{demo}", "{alpha}", "--superclass", "creature"], "mode RGBA"),
    (["tune", "{demo}", "{deep}", "--superclass", "creature"], "mode I;16"),
    (["tune", "{demo}", "{png}", "--superclass", "creature", "--out", "{kept}"], "there already"),
    (["apply", "{demo}", "{txt}", "--prompt", "a"], "txt"),
])
def test_what_cannot_be_done_is_said_in_a_sentence(main, arguments, says, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("no picture")
    (tmp_path / "kept.safetensors").write_bytes(b"")
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png")
    Image.new("RGBA", (100, 100)).save(tmp_path / "alpha.png")
    Image.new("I;16", (100, 100)).save(tmp_path / "deep.png")
    places = {"png": DEMO / "pictures" / "mimi.png", "demo": DEMO, "txt": tmp_path / "a.txt",
              "kept": tmp_path / "kept.safetensors"}
    places |= {name: tmp_path / f"{name}.png" for name in ("wide", "alpha", "deep")}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert says in capsys.readouterr().err
