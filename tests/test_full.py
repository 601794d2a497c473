"""The main job at full size, on random weights, through the stock loader, text encode and sampler.

`make test` runs sd1, `make test-full` all of them.
"""

import gc
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.host, pytest.mark.full]

PROJECTIONS = {"sd1": 32, "sd2-v": 32, "sdxl": 140}
LARGEST = {"sd1": 40, "sd2-v": 40, "sdxl": 200}  # KB, 1 KB = 1024 bytes
RESOLUTION = 64


@pytest.fixture(params=PROJECTIONS)
def family(request):
    yield request.param
    gc.collect()


@pytest.fixture
def checkpoint(family):
    """A full-size checkpoint of random weights, where the stock loader finds it; deleted afterwards but for SD1.5."""
    import folder_paths

    import checkpoints

    folder = Path(__file__).parent.parent / "build"
    folder.mkdir(exist_ok=True)
    path = folder / f"{family}-random.safetensors"
    if not path.exists():
        checkpoints.save_full(family, path)
    folder_paths.add_model_folder_path("checkpoints", str(folder))
    yield path.name
    if family != "sd1":
        path.unlink()


def test_a_photograph_becomes_a_file_and_the_file_a_word_in_the_stock_nodes(family, checkpoint, tmp_path):
    from skimage import data

    import nodes
    from perfusion.bench.memory import allocated
    from perfusion.core import apply as applying
    from perfusion.core import host_comfy
    from perfusion.core.concept import load, save
    from perfusion.core.tune import Tuning, tune

    captions = Path(__file__).parent.parent / "core" / "captions.txt"
    # 24 captions and the ridge that so few are given: a full-size encoder reads one a second on this CPU
    (tmp_path / "captions.txt").write_text("\n".join(captions.read_text(encoding="utf-8").splitlines()[:24]))
    with torch.inference_mode():
        model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(checkpoint)
        assert len(applying.projections(model.model.diffusion_model)) == PROJECTIONS[family]

        photo = torch.from_numpy(data.chelsea().copy()).float()[None] / 255
        host = host_comfy.ComfyHost(model, clip, vae, "cat", tmp_path)
        losses = []
        concept = tune(host, photo, "cat", "<mimi>", Tuning(steps=2, batch=1, resolution=RESOLUTION),
                       report=lambda progress: losses.append(progress.losses[-1]))
        assert len(losses) == 2 and concept.training["ridge"] > 0

        latents, held = torch.zeros(1, 4, 16, 16), model.model_size() + clip.patcher.model_size()
        step = host_comfy.any_tune(host, latents)
        told = held + host.needed(step, tight=True)
        with host.training(latents, tight=True):
            taken = held + allocated(step)
        assert abs(told / taken - 1) < 0.15
        print(f"{family}: a tune at 128 pixels takes {taken / 2**30:.3f} GB, told were {told / 2**30:.3f} GB")
        del host, step

        path = save(concept, tmp_path / "mimi.safetensors")
        assert path.stat().st_size <= LARGEST[family] * 1024
        print(f"{family}: {path.stat().st_size / 1024:.1f} KB, losses {losses}")

        def sample(model, clip, prompt):
            encode = nodes.CLIPTextEncode().encode
            (positive,), (negative,) = encode(clip, prompt), encode(clip, "")
            (latent,) = nodes.EmptyLatentImage().generate(RESOLUTION, RESOLUTION)
            (latent,) = nodes.KSampler().sample(model, 1, 2, 5.0, "euler", "normal", positive, negative, latent)
            return nodes.VAEDecode().decode(vae, latent)[0]

        base = sample(model, clip, "a photo of a cat")
        edited = sample(*applying.apply(model, clip, load(path).at(1)), "a photo of a <mimi>")
        off = sample(*applying.apply(model, clip, load(path).at(0)), "a photo of a <mimi>")
        assert edited.isfinite().all() and not torch.equal(edited, base)
        assert torch.equal(off, base)
        assert torch.equal(sample(model, clip, "a photo of a cat"), base)
