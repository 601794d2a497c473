"""What a tune takes of memory by base and resolution, and how well that is known before it starts.

`predicted` is core/memory.py's, of models at full size whose weights have no content, in fp16 as a card loads them.
`--real` takes real steps on the CPU, on weights of zeros, and holds the prediction for them against what PyTorch's
allocator counted. Both are of fused attention. Writes bench/results/memory.json; what it has of other kinds stays.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial

import torch

from headless.comfy import MISSING, ROOT, enter

enter(cpu=True) or sys.exit(MISSING)
sys.path.append(str(ROOT / "tests"))
import comfy.sd  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from comfy.model_management import module_size  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

from perfusion.bench.memory import allocated  # noqa: E402
from perfusion.core.host_comfy import ComfyHost, any_tune  # noqa: E402
from perfusion.core.memory import rehearsed  # noqa: E402

import checkpoints  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "memory.json"
SIZES = {"sd1": (256, 384, 512, 768), "sd2": (512, 768), "sdxl": (512, 768, 1024)}
GOALS = {("sd1", 512): 8, ("sdxl", 1024): 16}  # GB that are to be enough, with blocks computed twice
GB = 2**30
CPU, META = torch.device("cpu"), torch.device("meta")
VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
       "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}


def whole(kind: str, folder, dtype=torch.float16) -> ComfyHost:
    """The host over a model of a kind at full size, whose weights have no content."""
    config = checkpoints._classes(tiny=False)[kind](checkpoints._unet_config(kind, checkpoints.FULL_UNETS[kind]))
    config.set_inference_dtype(dtype, None)
    model = ModelPatcher(config.get_model({}, device=META), load_device=CPU, offload_device=CPU)
    clip = comfy.sd.CLIP(config.clip_target(), model_options={"initial_device": META, "dtype": dtype})
    host = ComfyHost(model, clip, None, "cat", folder)
    host.learn_on(model, clip.patcher)
    return host


def latents(side: int) -> torch.Tensor:
    return torch.zeros(1, 4, side // 8, side // 8)


def predicted(kind: str, folder) -> list[dict]:
    """A row for each resolution."""
    host, vae, rows = whole(kind, folder), AutoencoderKL(ddconfig=VAE, embed_dim=4).to(META, torch.bfloat16), []
    held = host.source.model_size() + host.clip.patcher.model_size()
    for side in SIZES[kind]:
        begun = time.perf_counter()
        plain, tight = (held + host.needed(any_tune(host, latents(side)), tight) for tight in (False, True))
        seconds = time.perf_counter() - begun
        with torch.no_grad():
            picture = partial(torch.zeros, 1, 3, side, side, dtype=torch.bfloat16)
            encoding = module_size(vae) + rehearsed(lambda picture=picture: vae.encode(picture()), [vae], CPU)
        goal = GOALS.get((kind, side))
        rows.append({"base": kind, "side": side, "weights": held, "plain": plain, "tight": tight, "vae": encoding,
                     "goal": goal, "met": goal and tight < goal * GB, "seconds": seconds})
        reached = f"{goal} GB {'met' if tight < goal * GB else 'MISSED'}" if goal else ""
        sizes = "".join(f"{size / GB:9.2f}" for size in (held, plain, tight, encoding))
        print(f"{kind:6}{side:6}{sizes}{reached:>14}{seconds:9.1f}", flush=True)
    return rows


def measured(kind: str, folder, side: int, dtype) -> list[dict]:
    """Rows of real steps at a resolution, with all kept for the way back and with blocks computed twice."""
    host, rows = whole(kind, folder, dtype), []
    for module in host.source.model.diffusion_model, host.text:
        for tensor in module.to_empty(device=CPU).state_dict().values():
            tensor.zero_()
    work = any_tune(host, latents(side))
    for tight in (False, True):
        said = host.needed(work, tight)
        with host.blocks(tight):
            found = allocated(work)
        rows.append({"base": kind, "side": side, "dtype": str(dtype), "tight": tight, "predicted": said,
                     "measured": found})
        print(f"{kind:6}{side:6}{str(dtype):>16}{'tight' if tight else 'plain':>7}{said / GB:9.3f}{found / GB:9.3f}"
              f"{said / found - 1:+9.1%}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--real", type=int, nargs="*", help="take real steps at so many pixels a side instead")
    parser.add_argument("--dtype", default="float32", help="of the real steps")
    given = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"predicted": [], "measured": []}
    part, sides = ("predicted", SIZES) if given.real is None else ("measured", dict.fromkeys(SIZES, given.real))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        print("GB, beside the weights: predicted, measured" if given.real else
              "GB              weights    plain    tight      vae          goal  seconds")
        for kind in given.kinds:
            found[part] = [row for row in found[part] if row["base"] != kind or row["side"] not in sides[kind]]
            found[part] += predicted(kind, folder) if given.real is None else [
                row for side in given.real for row in measured(kind, folder, side, getattr(torch, given.dtype))]
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
