"""The demo's miniature in ComfyUI: the numbers of the libraries that wrote it, stock nodes, and a tune."""

import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPVisionModel

from perfusion.bench import mini_models, world
from perfusion.core import apply as applying
from perfusion.core import demo_comfy
from perfusion.core.encoder import Encoder
from perfusion.core.host_comfy import tower_of
from perfusion.core.quick_tune import quick_tune
from perfusion.core.tower import of_transformers, tokens_of
from perfusion.core.tune import Tuning
from perfusion.headless.learn import DEMO

pytestmark = pytest.mark.host

SCALE = 0.7  # of the latents; not 1, so that a factor too few or too many is seen
C = mini_models.CHANNELS
PROMPTS = ["creature", "a red creature, left of a house"]


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(miniature, tmp_path_factory):
    draw = torch.Generator().manual_seed(1)
    picks = torch.randint(len(world.WORDS), (256, 12), generator=draw).tolist()
    lines = [" ".join(world.WORDS[k] for k in row) for row in picks]
    return miniature(tmp_path_factory.mktemp("demo"), lines, SCALE)


@pytest.fixture(scope="module")
def loaded(folder):
    with torch.inference_mode():  # as in a prompt
        return demo_comfy.load(folder)


def weights(*patchers):
    return [{name: t.clone() for name, t in p.model.state_dict().items()} for p in patchers]


@torch.inference_mode()
def test_the_unet_and_its_noise_schedule_are_those_of_the_files(folder, loaded):
    ours, theirs = loaded[0].model, UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    x, context, step = random(2, C, 16, 16) * 4 - 2, random(2, 77, 128, seed=1), torch.tensor([40, 900])
    v = theirs(x, step, context).sample
    torch.testing.assert_close(ours.diffusion_model(x, step.float(), context=context), v, atol=1e-4, rtol=1e-4)
    kept = DDIMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod[step].view(2, 1, 1, 1)
    sigma = ((1 - kept) / kept).sqrt()  # the host's x is that of diffusers over √kept, and its answer is x0
    found = ours.apply_model(x / kept.sqrt(), sigma.flatten(), c_crossattn=context)
    torch.testing.assert_close(found, kept.sqrt() * x - (1 - kept).sqrt() * v, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", [*PROMPTS, ""])
def test_the_text_encoder_reads_padded_prompts_as_transformers_does(folder, loaded, prompt):
    theirs = mini_models.build()["text_encoder"]
    stored = safetensors.torch.load_file(folder / "text_encoder/model.safetensors")
    prefix = "" if any(name.startswith("text_model.") for name in theirs.state_dict()) else "text_model."
    theirs.load_state_dict({name.removeprefix(prefix): t.float() for name, t in stored.items()})
    ids = mini_models.compact_ids([prompt])
    clip = loaded[1]
    assert [t for t, _ in clip.tokenize(prompt)["l"][0]] == mini_models.tokenizer()(
        prompt, padding="max_length", max_length=77).input_ids
    found = clip.encode_from_tokens(clip.tokenize(prompt))
    torch.testing.assert_close(found, theirs.eval()(ids).last_hidden_state, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_vae_makes_and_reads_the_latents_of_the_files(folder, loaded):
    model, _, vae, _ = loaded
    theirs = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    pixels = random(1, 64, 48, 3)
    latents = theirs.encode(pixels.movedim(-1, 1) * 2 - 1).latents
    ours = model.model.process_latent_in(vae.encode(pixels))
    torch.testing.assert_close(ours, latents * theirs.config.scaling_factor, atol=1e-4, rtol=1e-4)
    assert theirs.config.scaling_factor == SCALE
    z = random(1, C, 8, 6, seed=2) * 6 - 3
    picture = (theirs.decode(z / SCALE).sample.movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    assert picture.std() > 1e-3
    torch.testing.assert_close(vae.decode(model.model.process_latent_out(z)), picture, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_vision_tower_reads_what_transformers_reads(folder, loaded):
    pictures = random(3, 128, 96, 3)
    model = CLIPVisionModel.from_pretrained(folder / "vision", torch_dtype=torch.float32)
    ours, theirs = tower_of(loaded[3]), of_transformers(model)
    assert ours.hash == theirs.hash and ours.size == 128
    a, b = (tokens_of(tower, pictures, Encoder.read) for tower in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    embeds = loaded[3].encode_image(pictures)["image_embeds"]
    assert embeds.shape == (3, 128) and embeds.isfinite().all()


def test_stock_nodes_make_a_picture_of_it(loaded):
    import nodes

    model, clip, vae, _ = loaded
    with torch.inference_mode():
        positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (PROMPTS[1], ""))
        empty = nodes.EmptyLatentImage().generate(128, 96)[0]
        latent = nodes.KSampler().sample(model, 5, 3, 4.0, "euler", "normal", positive, negative, empty)[0]
        picture = nodes.VAEDecode().decode(vae, latent)[0]
        again = nodes.VAEEncode().encode(vae, picture)[0]["samples"]
    assert picture.shape == (1, 96, 128, 3) and picture.isfinite().all()
    assert again.shape == latent["samples"].shape == (1, C, 12, 16) and again.isfinite().all()


class Watch:
    def captions(self, done, total): ...

    def picture(self, before): ...

    def step(self, progress): ...

    def note(self, text): ...


def test_a_tune_learns_under_the_captions_of_the_folder_and_leaves_the_model_as_it_was(folder, loaded, tmp_path):
    model, clip, vae, _ = loaded
    before = weights(model, clip.patcher)
    with torch.inference_mode():
        concept, plain, after = quick_tune(
            model, clip, vae, random(1, 64, 64, 3), "creature", "<mimi>",
            Tuning(steps=2, batch=1, resolution=64, templates=("a {} , left",)), None, None, tmp_path, Watch(), None)
    assert concept.base == "creature" and concept.prediction == "v" and concept.training["captions"] == 256
    assert set(concept.embedding) == {"clip_l"} and len(concept.target_output) == 7
    assert plain.isfinite().all() and not torch.equal(plain, after)
    assert [path.stem for path in (folder / "covariance").iterdir()] == [concept.covariance]
    assert not (tmp_path / "covariance").exists()
    for was, now in zip(before, weights(model, clip.patcher)):
        assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)


def test_it_is_known_as_the_demo_and_takes_its_own_text_encoder(loaded, tiny):
    assert applying.base_of(loaded[0]) == "creature"
    applying.check_clip(loaded[1], "creature")
    with pytest.raises(ValueError, match="the creature demo"):
        applying.check_clip(tiny("sd2")[1], "creature")


def test_copies_with_weights_of_their_own_come_from_the_files(folder, loaded):
    for patcher in (loaded[0], loaded[1].patcher):
        load, where = patcher.cached_patcher_init
        again = load(*where)
        assert again.model is not patcher.model
        assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights(again, patcher))))


def test_loading_changes_nothing_in_the_host(folder):
    import comfy.latent_formats
    import comfy.supported_models
    import comfy.supported_models_base

    def state():
        tables = [vars(m) for m in (comfy.supported_models, comfy.supported_models_base, comfy.latent_formats)]
        classes = [vars(c) for c in (comfy.supported_models_base.BASE, comfy.latent_formats.LatentFormat)]
        return [{name: id(value) for name, value in table.items()} for table in tables + classes], list(
            comfy.supported_models.models)

    before = state()
    demo_comfy.load(folder)
    assert state() == before


@pytest.mark.parametrize("name", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors",
                                  "text_encoder/model.safetensors", "tokenizer/tokenizer.json", "vae/config.json",
                                  "vision/config.json", "vision/model.safetensors"])
def test_a_file_that_is_missing_or_damaged_is_named(folder, tmp_path, name):
    place = tmp_path / "demo"
    shutil.copytree(folder, place)
    data = (place / name).read_bytes()
    (place / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{name} is damaged. Restore"):
        demo_comfy.load(place)
    (place / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing. Restore"):
        demo_comfy.load(place)


def test_the_node_gives_four_things_or_says_what_is_missing(folder, monkeypatch, tmp_path):
    from perfusion.nodes import demo

    monkeypatch.setattr(demo, "DEMO", folder)
    model, clip, vae, vision = demo.DemoModel.execute().result
    assert applying.base_of(model) == "creature" and clip.patcher and vae.first_stage_model and vision.patcher
    monkeypatch.setattr(demo, "DEMO", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="missing"):
        demo.DemoModel.execute()


def test_a_demo_picture_is_its_file_and_all_are_a_batch_in_the_lists_order(pack):
    node = pack["PerfusionDemoPicture"]
    *listed, last = node.define_schema().inputs[0].options
    assert last == "all" and listed[0] == "mimi" and len(listed) == 6 == len(list((DEMO / "pictures").iterdir()))
    (every,) = node.execute("all").result
    for name, picture in zip(listed, every, strict=True):
        (image,) = node.execute(name).result
        file = torch.from_numpy(np.array(Image.open(DEMO / "pictures" / f"{name}.png")))
        assert image.shape == (1, 128, 128, 3) and image.dtype == torch.float32
        assert torch.equal(image[0], file / 255) and torch.equal(picture, image[0])


def test_a_demo_picture_that_is_missing_or_damaged_is_named(tmp_path):
    path = tmp_path / "pictures" / "mimi.png"
    path.parent.mkdir()
    data = (DEMO / "pictures" / "mimi.png").read_bytes()
    for part in data[: len(data) // 2], data[:20], b"version https://git-lfs.github.com/spec/v1":
        path.write_bytes(part)
        with pytest.raises(ValueError, match="mimi.png is damaged. Restore"):
            demo_comfy.load_picture(tmp_path, "mimi")
    path.unlink()
    with pytest.raises(ValueError, match="mimi.png is missing. Restore"):
        demo_comfy.load_picture(tmp_path, "mimi")


def test_both_hosts_encode_the_demos_picture_alike(tmp_path):
    from perfusion.core import domain as domains
    from perfusion.core import host_diffusers
    from perfusion.core.domain_comfy import encode_concept
    from perfusion.core.encode import encode

    domain = domains.load(DEMO / "domains" / "creature.safetensors")
    photo = torch.from_numpy(np.array(Image.open(DEMO / "pictures" / "mimi.png"), dtype=np.float32) / 255)[None]
    with torch.inference_mode():
        model, clip, vae, vision = demo_comfy.load(DEMO)
        here = encode_concept(domain, model, clip, vae, vision, photo, "creature", "<mimi>", None, DEMO,
                              lambda done, total: None)
    host = host_diffusers.DiffusersHost(host_diffusers.load(DEMO), "creature", DEMO)
    there = encode(host, domain, tokens_of(tower_of(vision), photo, domain.encoder.read), host.latents(photo),
                   "creature", "<mimi>")
    for name in ("embedding", "target_input", "direction", "target_output"):
        torch.testing.assert_close(getattr(here, name), getattr(there, name), atol=2e-3, rtol=2e-3)
