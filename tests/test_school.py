"""Train Domain as a command, on a random miniature: broken runs, several processes, parts of a step, bad folders."""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from perfusion.bench import world
from perfusion.core.domain import load, save

ROOT = Path(__file__).parent.parent
# --cpu would quietly start one process
TWO = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
       "no", "--dynamo_backend", "no", "-m")


@pytest.fixture(scope="module")
def place(miniature, tmp_path_factory):
    """A folder with a model, a tower, and pictures, some with captions."""
    place, r = tmp_path_factory.mktemp("school"), torch.Generator().manual_seed(1)
    (place / "model").mkdir()
    miniature(place / "model", world.sample(40, r)["captions"])
    (place / "model" / "training.json").write_text("{}")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, hidden_size=32, intermediate_size=64,
                                     num_hidden_layers=4, num_attention_heads=2)).save_pretrained(place / "tower")
    (place / "pictures" / "more").mkdir(parents=True)
    for k in range(10):
        path = place / "pictures" / ("more" if k % 2 else "") / f"{k}.png"
        Image.fromarray(torch.randint(256, (64, 80, 3), generator=r).byte().numpy()).save(path)
        if k % 3:
            path.with_suffix(".txt").write_text("a photo of a creature at night\nthe {} in the snow\n")
    return place


def command(place, out, *more, steps=4):
    options = ["--tower", place / "tower", "--superclass", "creature", "--out", out, "--steps", steps, "--batch", 4,
               "--resolution", 64, "--every", 2, *more]
    return list(map(str, ["train-domain", place / "model", place / "pictures", *options]))


@pytest.fixture(scope="module")
def school(main):
    """Runs the command to its end in this process, after which accelerate's state is let go of."""
    from accelerate.state import AcceleratorState

    def run(*arguments, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(command(*arguments, **changes))

    return run


def start(arguments, *launch):
    """A process of its own that runs the command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", *launch, "headless", *arguments], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


@pytest.fixture(scope="module")
def unbroken(place, school):
    assert school(place, place / "unbroken.safetensors") == 0
    return load(place / "unbroken.safetensors")


def numbers(domain):
    return [*domain.encoder.state_dict().values(), *(t for offset in domain.offsets.values() for t in offset)]


def closest(a, b):
    return max((x - y).abs().max().item() for x, y in zip(numbers(a), numbers(b), strict=True))


def apart(a, b):
    """How far two domains are apart in what starts at zero, over how far it has moved."""
    a, b = (torch.cat([t.flatten() for t in (*(o.output for o in d.offsets.values()), *(
        layer.weight for layer in d.encoder.out.values()))]) for d in (a, b))
    return ((a - b).norm() / a.norm()).item()


def test_a_run_leaves_a_domain_samples_and_a_checkpoint(place, unbroken):
    work = place / "unbroken.work"
    assert {p.name for p in work.glob("sample-*")} == {"sample-000002.png", "sample-000004.png"}
    assert unbroken.superclass == "creature" and unbroken.training["steps"] == 4
    assert all(layer.weight.abs().max() > 0 for layer in unbroken.encoder.values.values())


def test_a_broken_run_ends_as_an_unbroken_one(place, school, unbroken, tmp_path):
    """Killed while it learns, between checkpoints."""
    out = tmp_path / "broken.safetensors"
    process, checkpoint = start(command(place, out, "--every", 1)), out.with_suffix(".work") / "checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    process.kill()
    said, _ = process.communicate()
    assert checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] < 4, said
    assert school(place, out) == 0
    assert closest(load(out), unbroken) == 0


def shown(said):
    """The error that each step printed."""
    return [float(error) for error in re.findall(r"step \d+ of \d+, error ([\d.]+)", said)]


def test_two_processes_and_parts_of_a_step_learn_and_show_what_one_does(place, school, unbroken, tmp_path, capsys):
    process = start(command(place, tmp_path / "two.safetensors"), *TWO)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "on 2 processes" in said, said
    assert school(place, tmp_path / "parts.safetensors", "--accumulate", 2) == 0
    assert len(shown(said)) == 4 and shown(said) == pytest.approx(shown(capsys.readouterr().out), rel=1e-2)
    assert school(place, tmp_path / "other.safetensors", "--seed", 1) == 0  # of other pictures and noise
    assert apart(unbroken, load(tmp_path / "other.safetensors")) > 0.5
    assert apart(unbroken, load(tmp_path / "two.safetensors")) < 0.05
    assert apart(unbroken, load(tmp_path / "parts.safetensors")) < 0.05


def test_another_training_does_not_go_on_from_a_checkpoint(place, school, unbroken, capsys):
    assert school(place, place / "unbroken.safetensors", "--learning-rate", 0.5) == 2
    said = capsys.readouterr().err
    assert "learning_rate" in said and "begin anew" in said


def test_a_training_begins_with_another_domain_and_says_with_which(place, school, unbroken, tmp_path, capsys):
    first = place / "unbroken.safetensors"
    still = tmp_path / "still.safetensors", "--begin", first, "--learning-rate", 0.0
    assert school(place, *still) == 0
    found = load(still[0])
    assert closest(found, unbroken) == 0 and found.training["begun"] == unbroken.hash[:16]
    assert school(place, still[0], "--learning-rate", 0.0) == 2 and "begun" in capsys.readouterr().err
    save(replace(unbroken, tower="other"), tmp_path / "other.safetensors")
    assert school(place, tmp_path / "x.safetensors", "--begin", tmp_path / "other.safetensors") == 2
    assert "another vision tower" in capsys.readouterr().err


@pytest.fixture
def album(place, school):
    """The module that reads the pictures of a folder, and what it needs for that of `place`."""
    album, commands = sys.modules["headless.album"], sys.modules["headless.domain"]
    pipe, folder = commands.open_model(place / "model")
    host = commands.host_diffusers.DiffusersHost(pipe, "creature", folder)
    return album, album.Folder(place / "pictures"), host, commands.open_tower(place / "tower")


def test_pictures_are_read_some_at_a_time_with_the_numbers_of_one_at_a_time(album, place, tmp_path, monkeypatch):
    album, folder, host, tower = album
    sizes, few = [], replace(tower, states=lambda x: sizes.append(len(x)) or tower.states(x))
    monkeypatch.setattr(album, "AT_ONCE", 4)
    latents, tokens = album.seen(folder, range(10), tmp_path, host, few, 64)
    assert sizes == [4, 4, 2] and len(latents) == len(tokens) == 10
    for k in 0, 5, 9:
        picture = album.square(folder.picture(k), 64)
        torch.testing.assert_close(latents[k : k + 1].float(), host.latents(picture), atol=1e-4, rtol=2e-3)
        found = album.tokens_of(tower, picture, album.Encoder.read)
        torch.testing.assert_close(tokens[k : k + 1].float(), found, atol=2e-3, rtol=2e-3)


def test_another_vae_or_another_scale_of_it_sees_the_pictures_anew(album, place, tmp_path):
    album, folder, host, tower = album

    def latents():
        return album.seen(folder, range(10), tmp_path, host, tower, 64)[0]

    first, vae = latents(), host.pipe.vae
    assert torch.equal(latents(), first) and len(list(tmp_path.iterdir())) == 1
    vae.register_to_config(scaling_factor=2 * vae.config.scaling_factor)
    torch.testing.assert_close(latents(), 2 * first)
    vae.register_to_config(scaling_factor=vae.config.scaling_factor / 2)
    next(vae.encoder.parameters()).data *= 1.5
    assert (latents() - first).abs().max() > 1e-3


def test_each_thing_that_a_training_is_of_has_a_fact_of_its_own(album, place, tmp_path):
    album, folder, host, tower = album
    shutil.copytree(place / "pictures", tmp_path, dirs_exist_ok=True)
    lines = [["a {}"]] * len(folder)

    def facts(folder=folder, tower=tower, lines=lines, resolution=64):
        return sys.modules["headless.domain"].facts_of(host, tower, folder, lines, resolution)

    first = facts()

    def changed(found):
        assert all(len(str(fact)) <= 16 for fact in found.values())
        return {name for name in first if found[name] != first[name]}

    assert changed(facts(album.Folder(tmp_path))) == set()
    (tmp_path / "8.png").write_bytes((tmp_path / "8.png").read_bytes() + b" ")
    assert changed(facts(album.Folder(tmp_path))) == {"pictures"}
    shutil.copy(place / "pictures" / "8.png", tmp_path)
    (tmp_path / "6.png").unlink()
    assert changed(facts(album.Folder(tmp_path))) == {"pictures"}
    assert changed(facts(tower=replace(tower, hash="0123"))) == {"tower"}
    assert changed(facts(lines=[*lines[1:], ["a big {}"]])) == {"captions"}
    assert changed(facts(resolution=128)) == {"resolution"}
    for part, fact in (host.pipe.unet, {"model"}), (host.pipe.vae, {"model"}), (host.pipe.text_encoder,
                                                                                {"model", "covariance"}):
        weight = next(part.parameters())
        before = weight.data.clone()
        weight.data += 0.1
        assert changed(facts()) == fact
        weight.data = before
    captions = place / "model" / "captions.txt"
    before = captions.read_text(encoding="utf-8")
    captions.write_text(f"{before}\na creature of another kind", encoding="utf-8")
    assert changed(facts()) == {"covariance"}
    captions.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("more, says", [
    (["--batch", 5, "--accumulate", 2], "multiple of 2"), (["--tower", "nowhere"], "not a folder of a CLIP vision"),
    (["--superclass", "wibble"], "superclass"), (["--steps", 0], "at least one step"),
])
def test_what_cannot_be_trained_gets_a_sentence(place, school, tmp_path, capsys, more, says):
    assert school(place, tmp_path / "x.safetensors", *more) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()


def test_a_folder_without_pictures_and_captions_without_a_place_get_a_sentence(place, school, tmp_path, capsys):
    for name in "model", "tower":
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "pictures").mkdir()
    assert school(tmp_path, tmp_path / "x.safetensors") == 2
    assert "holds 0 pictures" in capsys.readouterr().err
    shutil.copytree(place / "pictures", tmp_path / "pictures", dirs_exist_ok=True)
    (tmp_path / "pictures" / "0.txt").write_text("a photo of a dog\n")
    assert school(tmp_path, tmp_path / "y.safetensors") == 2
    assert "a photo of a dog" in capsys.readouterr().err


def test_a_caption_whose_thing_is_out_of_reach_is_told_with_its_file_before_anything_is_read(
        place, school, tmp_path, capsys):
    for name in "model", "tower":
        (tmp_path / name).symlink_to(place / name)
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "more" / "9.txt").write_text(f"a {{}}\na {'red ' * 74} creature\n")
    assert school(tmp_path, tmp_path / "x.safetensors") == 2
    said = capsys.readouterr().err
    assert str(Path("more") / "9.txt") in said and "is too long" in said and "Say less before it" in said
    assert not (tmp_path / "x.work").exists()
