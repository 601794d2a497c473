"""`make world`: the miniature from nothing, in four to five hours on two CPU cores. It goes on where it was stopped.

    draw       pictures of the world
    vae        the autoencoder: pictures to latents and back
    latents    the pictures' latents
    decoded    some of them as pictures again
    reader     the network that reads pictures: bench/reader.safetensors
    denoiser   UNet and text encoder
    words      the same, taught to read words and not the padding after them
    tower      the vision tower
    write      demo/: fp16 files, the world's captions and their covariance, and training.json with all settings

On a CPU, what is trained runs as one process a core (see mini_loop).
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from . import mini_autoencoder, mini_data, mini_denoiser, mini_loop, mini_models, mini_tower, train_reader, world

ROOT = Path(__file__).resolve().parent.parent
WORK, DEMO = ROOT / "build" / "world", ROOT / "demo"
SETTINGS = {
    "seed": 1, "shards": 40,
    "vae": {"steps": 6000, "lr": 1e-3, "shards": 8},
    "denoiser": {"steps": 22000, "lr": 1e-3},
    "words": {"steps": 4000, "lr": 4e-4, "padless": 0.8},
    "tower": {"steps": 3600, "lr": 1e-3, "shards": 40},
    "decoded": 4, "captions": 1000,
}
NAMES = "mimi", "bobo", "rex", "lulu", "ted", "zaza"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw():
    mini_data.draw(WORK / "pictures", SETTINGS["shards"], SETTINGS["seed"])


def trained(name, module, loss, stop=None):
    """`module` as it comes out of its training, which goes on if it has not ended."""
    how = SETTINGS[name]
    return mini_loop.train(name, WORK, module.to(DEVICE), loss, how["steps"], how["lr"], SETTINGS["seed"], stop)


def vae():
    torch.manual_seed(SETTINGS["seed"])
    module = AutoencoderTiny(latent_channels=mini_models.CHANNELS).to(memory_format=torch.channels_last)
    data = mini_data.load(WORK / "pictures", SETTINGS["vae"]["shards"])
    return trained("vae", module, mini_autoencoder.loss(module, data))


def latents():
    module = vae()
    for k in range(mini_loop.RANK, SETTINGS["shards"], mini_loop.WORKERS):
        path = WORK / "latents" / f"{k:03}.safetensors"
        if not path.exists():
            pictures = safetensors.torch.load_file(WORK / "pictures" / f"{k:03}.safetensors")["pictures"]
            mini_data.keep(path, {"latents": mini_denoiser.encode(module, pictures)})


def decoded():
    """Pictures as the autoencoder gives them back, for the reader."""
    module = vae()
    for k in range(mini_loop.RANK, SETTINGS["decoded"], mini_loop.WORKERS):
        z = safetensors.torch.load_file(WORK / "latents" / f"{k:03}.safetensors")["latents"]
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            x = torch.cat([module.decoder(part.float().to(DEVICE)).cpu() for part in z.split(32)])
        x = ((x.float() + 1) * 127.5).clamp(0, 255).round().byte()
        mini_data.keep(WORK / "decoded" / f"{k:03}.safetensors", {"pictures": x})


def denoiser(stop=None):
    """The denoiser as its first training leaves it, and its loss for another share of prompts without padding."""
    torch.manual_seed(SETTINGS["seed"])
    nets = mini_models.build()
    module = mini_denoiser.Denoiser(nets["unet"], nets["text_encoder"])
    data = mini_data.load(WORK / "pictures", SETTINGS["shards"], without=("pictures",))
    data |= mini_data.load(WORK / "latents", SETTINGS["shards"])
    scaling_factor = 1 / data["latents"][:2000].float().std().item()
    module = trained("denoiser", module, mini_denoiser.loss(module, data, scaling_factor), stop)
    return module, partial(mini_denoiser.loss, module, data, scaling_factor), scaling_factor


def words(stop=None):
    """The trained denoiser, and what its latents are multiplied with."""
    module, loss, scaling_factor = denoiser()
    return trained("words", module, loss(SETTINGS["words"]["padless"]), stop), scaling_factor


def tower():
    torch.manual_seed(SETTINGS["seed"])
    module = mini_tower.Contrast()
    data = mini_data.load(WORK / "pictures", SETTINGS["tower"]["shards"])
    return trained("tower", module, mini_tower.loss(module, data)).tower


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


STAGES = {"draw": draw, "vae": vae, "latents": latents, "decoded": decoded, "reader": train_reader.main,
          "denoiser": denoiser, "words": words, "tower": tower}
TRAINED = [name for name in STAGES if name != "draw"]


def pictures(folder: Path):
    """A few creatures that nothing was trained on, in places of their own."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(SETTINGS["seed"])
    for name in NAMES:
        who = world.identities(1, "test", "creature", generator)
        context = world.contexts(1, generator, company="alone", thing="none", size="large", place="middle")
        picture = (world.render("creature", who, context)[0][0] * 255).round().byte()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")


def write(folder: Path, stop=None):
    """The miniature as it is after the denoiser's training, or with `stop` 0 as it is now."""
    from ..core.host_diffusers import DiffusersHost, load

    module, scaling_factor = words(stop)
    mini_models.save(folder, module.unet.cpu(), vae().cpu(), module.text_encoder.cpu(), scaling_factor)
    drawn = world.sample(SETTINGS["captions"], torch.Generator().manual_seed(SETTINGS["seed"]))
    (folder / "captions.txt").write_text("\n".join(drawn["captions"]) + "\n", encoding="utf-8")
    DiffusersHost(load(folder), "creature", folder).inverse_covariance()
    if (WORK / "tower.pt").exists():
        tower().cpu().half().save_pretrained(folder / "vision")
    pictures(folder / "pictures")
    facts = {"settings": SETTINGS, "scaling_factor": scaling_factor, "torch": torch.__version__}
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, help="this one alone")
    parser.add_argument("--snapshot", type=Path, help="write the miniature as it is now into this folder")
    arguments = parser.parse_args()
    if arguments.snapshot:
        return write(arguments.snapshot, stop=0)
    if arguments.stage:
        torch.set_num_threads(1)
        return STAGES[arguments.stage]()
    draw()
    workers = 1 if DEVICE == "cuda" else cores()
    for stage in TRAINED:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(workers),
                   "-m", "bench", "world", "--stage", stage]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    write(DEMO)

