"""Folders of the public E4T program: what they hold becomes a domain, and nothing in them runs.

They are built to the published names and shapes (tests/published_e4t.py), with random tensors.
"""

import os
import zipfile

import pytest
import torch
from diffusers import UNet2DConditionModel

from perfusion.core import host_diffusers, import_domain
from perfusion.core.domain import dump, load, parse
from perfusion.core.encode import check
from perfusion.core.import_domain import is_tuned, pretrained, tuned
from perfusion.core.openclip import as_transformers
from perfusion.core.public_encoder import PublicEncoder
from perfusion.core.tower import hash_of
from perfusion.core.weight_offset import check_fit, delta

import published_e4t as published


@pytest.fixture(scope="module")
def theirs():
    return published.encoder()


@pytest.fixture(scope="module")
def offsets():
    return published.offsets()


@pytest.fixture(scope="module")
def folder(theirs, offsets, tmp_path_factory):
    return published.save(tmp_path_factory.mktemp("made") / "faces", theirs.state_dict(), offsets)


@pytest.fixture
def changed(theirs, offsets, tmp_path):
    """Writes the folder with some of its tensors and facts put in place of its own; None takes one away."""
    def write(encoder=(), offset=(), **config):
        parts = (theirs.state_dict() | dict(encoder), offsets | dict(offset), published.CONFIG | config)
        return published.save(tmp_path / "faces", *({k: v for k, v in part.items() if v is not None}
                                                    for part in parts))
    return write


def refused(folder, *words, read=pretrained):
    with pytest.raises(ValueError) as caught:
        read(folder)
    message = str(caught.value)
    assert all(word in message for word in words) and message.endswith(".") and "\n" not in message, message


def test_a_folder_becomes_a_domain(folder, theirs):
    domain, notes = pretrained(folder)
    assert (domain.base, domain.prediction, domain.superclass) == ("sd1", "eps", "face")
    assert type(domain.encoder) is PublicEncoder and len(domain.offsets) == 96
    assert domain.training == {"imported": "mkshing e4t-diffusion", "model": "stable-diffusion-v1-4", "resolution": 512}
    assert domain.tower == hash_of(as_transformers(theirs.clip_vision.state_dict()))
    check(domain, "sd1", "eps", domain.tower, "face")
    with pytest.raises(ValueError, match="another vision tower"):
        check(domain, "sd1", "eps", "0123", "face")
    assert any(domain.tower[:12] in note for note in notes) and all(note.endswith(".") for note in notes)
    assert dump(parse(dump(domain), "x")) == dump(domain)


def test_every_offset_is_what_the_program_makes_of_its_tensors(folder, offsets):
    domain, _ = pretrained(folder)
    names = {"down_blocks.0.attentions.1": "input_blocks.2.1", "down_blocks.2.attentions.0": "input_blocks.7.1",
             "mid_block.attentions.0": "middle_block.1", "up_blocks.1.attentions.2": "output_blocks.5.1"}
    for block, name in names.items():
        for attn in ("attn1", "attn2"):
            for part in "qkv":
                found = delta(domain.offsets[f"{name}.transformer_blocks.0.{attn}.to_{part}"])
                wanted = published.change(offsets, f"{block}.transformer_blocks.0.{attn}.wo_{part}")
                torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_at_full_size_864_tensors_fit_the_96_weights_of_sd1():
    with torch.device("meta"):
        state = {name: torch.empty_like(t) for name, t in published.offsets((320, 640, 1280, 1280), 768).items()}
        unet = UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
    assert len(state) == 864 and sum(t.numel() for t in state.values()) == 143_226_592
    found, modules = import_domain._offsets(state, "x"), host_diffusers.attention(unet)
    assert found.keys() == modules.keys() and len(found) == 96
    check_fit(modules, found)
    assert sum(t.numel() for offset in found.values() for t in offset) == 373_632


def test_what_was_pretrained_counts_before_what_was_tuned(changed):
    before = published.CONFIG | {"domain_class_token": "cat", "resolution": 256}
    domain, _ = pretrained(changed(pretrained_args=before, domain_class_token=None, domain_embed_scale=0.3,
                                   pretrained_model_name_or_path="faces"))
    assert domain.superclass == "cat" and domain.training["resolution"] == 256
    assert domain.training["model"] == "stable-diffusion-v1-4"


def test_a_tuned_folder_gives_its_unet_too(changed, offsets):
    path = changed()
    (path / "weight_offsets.pt").unlink()
    refused(path, "lacks weight_offsets.pt")
    torch.save({"conv_in.weight": torch.ones(2, 2), **offsets}, path / "unet.pt")
    domain, rest, _ = tuned(path)
    assert is_tuned(path) and len(domain.offsets) == 96 and rest.keys() == {"conv_in.weight"}
    torch.save({}, path / "text_encoder.pt")
    refused(path, "tuned with its text encoder", read=tuned)


def test_a_file_that_is_missing_is_named(folder, tmp_path):
    for name in ("config.json", "encoder.pt", "weight_offsets.pt"):
        copy = tmp_path / name
        copy.mkdir()
        for other in {"config.json", "encoder.pt", "weight_offsets.pt"} - {name}:
            (copy / other).symlink_to(folder / other)
        refused(copy, name)
    refused(tmp_path / "nowhere", "weight_offsets.pt")


@pytest.mark.parametrize("how, says", [
    (dict(encoder={"first_linears.8.weight": None}), ("first_linears.8.weight", "is absent")),
    (dict(encoder={"final_linear.weight": torch.ones(64, 32), "final_linear.bias": torch.ones(64)}), ("64", "768")),
    (dict(encoder={"clip_vision.ln_pre.bias": None}), ("ln_pre.bias", "vision tower")),
    (dict(encoder={"clip_vision.proj": torch.ones(2, 2)}), ("proj", "vision tower")),
    (dict(encoder={"feature_linear.bias": torch.full((32,), torch.nan)}), ("feature_linear.bias", "NaN")),
    (dict(encoder={"feature_linear.bias": torch.ones(32, dtype=torch.long)}), ("torch.LongStorage",)),
    (dict(encoder={"feature_linear.bias": "no tensor"}), ("feature_linear.bias",)),
    (dict(encoder={"clip_vision.conv1.weight": torch.ones(1).expand(2**40)}), ("conv1.weight", "is none")),
    (dict(encoder={"feature_linear.weight": torch.ones(1, 1).expand(2**30, 2**30)}), ("feature_linear.weight",)),
    (dict(offset={"mid_block.attentions.0.transformer_blocks.0.attn1.wo_q.v": None}), ("attn1.wo_q", "is absent")),
    (dict(offset={"down_blocks.3.attentions.0.transformer_blocks.0.attn1.wo_q.v": torch.ones(1)}), ("down_blocks.3",)),
    (dict(offset={"conv_in.weight": torch.ones(1)}), ("unknown", "conv_in.weight")),
    (dict(offset={"mid_block.attentions.0.transformer_blocks.0.attn1.wo_q.linear_row.bias": torch.ones(9)}),
     ("attn1.wo_q", "linear_row.bias")),
    (dict(offset={"mid_block.attentions.0.transformer_blocks.0.attn1.wo_q.v": torch.full((1,), torch.inf)}),
     ("attn1.wo_q.v", "infinite")),
    (dict(domain_embed_scale=1.0), ("domain_embed_scale 1.0", "0.1")),
    (dict(domain_embed_scale=float("nan")), ("domain_embed_scale nan",)),
    (dict(domain_class_token=None), ("config.json", "domain_class_token")), (dict(domain_class_token=" "), ("config",)),
    (dict(domain_class_token=3), ("config",)), (dict(pretrained_model_name_or_path=[]), ("config",)),
    (dict(resolution=10**9), ("resolution",)), (dict(resolution="512"), ("resolution",)),
    (dict(pretrained_args=[1]), ("config",)),
])
def test_what_is_not_as_the_program_leaves_it_gets_a_sentence(changed, how, says):
    refused(changed(**how), *says)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 10**5, '{"domain_class_token": ' + '"a' * 10**6])
def test_a_config_that_is_none_gets_a_sentence(changed, text):
    path = changed()
    (path / "config.json").write_text(text)
    refused(path, "config.json")


class Touch:
    """Unpickled freely, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("part, name", [("encoder", "encoder.pt"), ("offset", "weight_offsets.pt")])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(changed, tmp_path, part, name):
    touched = tmp_path / "touched"
    path = changed(**{part: {"extra": Touch(touched)}})
    refused(path, name, "posix.system" if os.name == "posix" else "nt.system", "Nothing was run")
    assert not touched.exists()
    torch.load(path / name, weights_only=False)  # the trap was a real one
    assert touched.exists()


@pytest.mark.parametrize("name", ["encoder.pt", "weight_offsets.pt"])
def test_a_file_cut_short_gets_a_sentence(changed, name):
    path = changed() / name
    data = path.read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:size])
        refused(path.parent, name, "not a whole archive")


def test_a_compressed_archive_is_refused_and_not_read_as_it_lies(changed):
    path = changed() / "encoder.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    refused(path.parent, "compressed")


def test_a_file_larger_than_the_programs_is_not_read(changed):
    path = changed() / "encoder.pt"
    with open(path, "r+b") as file:
        file.truncate(import_domain.LARGEST + 2**20)
    refused(path.parent, "encoder.pt", "6145 MB", "another kind of file")


def test_nothing_of_the_files_is_kept_open(changed):
    path = changed()
    domain, _ = pretrained(path)
    before = dump(domain)
    for file in path.iterdir():
        file.write_bytes(b"")
    assert dump(domain) == before


def test_the_command_writes_a_domain_and_says_what_it_is(main, folder, tmp_path, capsys):
    command = ["convert", str(folder), "--out", str(tmp_path)]
    assert main(command) == 0
    said, made = capsys.readouterr().out, tmp_path / "faces.safetensors"
    assert load(made).superclass == "face" and f"{made} (" in said and "MB)" in said and "'face'" in said
    assert main(command) == 2 and "is there already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "lacks weight_offsets.pt" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("shape", [(2**40, 0), (0, 2**40), (2**31, 0)])
def test_a_tensor_without_numbers_does_not_say_how_many_layers_there_are(changed, shape):
    refused(changed(encoder={"clip_vision.positional_embedding": torch.zeros(shape)}), "not the encoder of the public")
