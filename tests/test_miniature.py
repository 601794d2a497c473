"""The miniature of Stable Diffusion: its parts, its files and the loop that trains it."""

import json

import torch
from torch import nn

from perfusion.bench import mini_autoencoder, mini_data, mini_denoiser, mini_loop, mini_models, mini_tower, world
from perfusion.core import host_diffusers

CAPTIONS = ["a creature", "a large blue spotted creature, in the snow", "", "a dragon on the left"]


def seeded():
    torch.manual_seed(0)
    return mini_models.build()


def test_every_word_of_the_world_is_one_token_between_start_and_end():
    ids = mini_models.tokenizer()(list(world.WORDS)).input_ids
    assert all(row[0] == 49406 and row[-1] == 49407 for row in ids)
    middles = {row[1] for row in ids if len(row) == 3}
    assert len(middles) == len(world.WORDS) and mini_models.WORDS.index("<unk>") not in middles


def test_all_words_of_the_templates_are_in_captions():
    from perfusion.core.tune import TEMPLATES

    said = {word for template in TEMPLATES for word in template.replace("{}", "").split()}
    assert said <= set(world.WORDS)
    drawn = " ".join(world.sample(600, torch.Generator().manual_seed(0))["captions"]).split()
    assert said <= set(drawn)


def test_the_compact_table_encodes_as_the_one_that_is_loaded(tmp_path):
    networks = seeded()
    mini_models.save(tmp_path, **networks, scaling_factor=1.0)
    pipe = host_diffusers.load(tmp_path)
    assert len(pipe.text_encoder.get_input_embeddings().weight) == 49408
    with torch.no_grad():
        ids = mini_models.compact_ids(CAPTIONS)
        compact = mini_models.text_encoder(len(mini_models.WORDS) + 2)
        compact.load_state_dict({name: w.half().float() for name, w in networks["text_encoder"].state_dict().items()})
        a = compact.eval()(ids).last_hidden_state
        b, _ = host_diffusers.encode_prompts(pipe, CAPTIONS)
    assert torch.equal(a, b)


def test_its_files_are_small(tmp_path):
    mini_models.save(tmp_path, **seeded(), scaling_factor=1.0)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size <= 16 * 2**20
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["cross_attention_dim"] == 128


def test_a_lost_shard_comes_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_data, "SHARD", 20)
    mini_data.draw(tmp_path, 2, seed=3)
    first = mini_data.load(tmp_path, 2)
    (tmp_path / "001.safetensors").unlink()
    mini_data.draw(tmp_path, 2, seed=3)
    again = mini_data.load(tmp_path, 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len(mini_data.captions(first, torch.tensor([0, 39]), torch.Generator().manual_seed(0))) == 2


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_loop, "EVERY", 2)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))

    def run(folder, *stops):
        folder.mkdir()
        for stop in stops:
            torch.manual_seed(0)
            module = nn.Linear(3, 3)

            def loss(generator, module=module):
                rows = torch.randint(64, (8,), generator=generator)
                return (module(x[rows]) - x[rows].flip(1)).square().mean()

            mini_loop.train("line", folder, module, loss, 6, 1e-2, seed=0, stop=stop)
        return module.weight

    assert torch.equal(run(tmp_path / "whole", None), run(tmp_path / "broken", 2, 4, None))


def test_the_networks_learn_the_world(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_data, "SHARD", 8)
    monkeypatch.setattr(mini_autoencoder, "BATCH", 2)
    monkeypatch.setattr(mini_denoiser, "BATCH", 4)
    monkeypatch.setattr(mini_tower, "BATCH", 4)
    mini_data.draw(tmp_path, 1, seed=0)
    data = mini_data.load(tmp_path, 1)
    nets = seeded()
    data["latents"] = mini_denoiser.encode(nets["vae"], data["pictures"])
    denoiser = mini_denoiser.Denoiser(nets["unet"], nets["text_encoder"])
    contrast = mini_tower.Contrast()
    for module, loss in ((nets["vae"], mini_autoencoder.loss(nets["vae"], data)),
                         (denoiser, mini_denoiser.loss(denoiser, data, 1.0)),
                         (contrast, mini_tower.loss(contrast, data))):
        before = [p.clone() for p in module.parameters()]
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16):  # as the loop does
                out = loss(torch.Generator().manual_seed(0))
            out = out[0] if isinstance(out, tuple) else out
            out.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.item())
        assert losses[-1] < losses[0]
        unused = sum(torch.equal(a, b) for a, b in zip(before, module.parameters()))
        assert unused == 0, f"{unused} weights never learn"
