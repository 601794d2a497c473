"""The main job on one page: a photograph becomes a concept, the concept a file, and the file a word in a prompt."""

from pathlib import Path

import numpy as np
import torch

from .comfy import MISSING, enter


class Console:
    """Watches a tune and prints what it hears."""

    def captions(self, done, total):
        print(f"\rcaptions read, once for this text encoder: {done} of {total}", end="\n" * (done == total), flush=True)

    def picture(self, before):
        print("learning")

    def step(self, progress):
        print(f"step {progress.step} of {progress.steps}, loss {progress.losses[-1]:.4f}, "
              f"{progress.seconds_left:.0f} s left", flush=True)


def demo(arguments):
    """Quick Tune on a photograph that scikit-image ships, in ComfyUI, and the saved concept applied."""
    if not enter(cpu=not torch.accelerator.is_available()):
        raise ValueError(MISSING)
    import comfy.sd
    from PIL import Image
    from skimage import data

    from perfusion.core.apply import apply
    from perfusion.core.concept import load, save
    from perfusion.core.covariance import PACKAGED
    from perfusion.core.host_comfy import picture
    from perfusion.core.quick_tune import quick_tune
    from perfusion.core.tune import Tuning

    build = Path(arguments.out)
    folder = build / "perfusion"
    folder.mkdir(parents=True, exist_ok=True)
    lines = PACKAGED.read_text(encoding="utf-8").splitlines()
    (folder / "captions.txt").write_text("\n".join(lines[: arguments.captions]), encoding="utf-8")
    with torch.inference_mode():
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(arguments.checkpoint)
        photo = torch.from_numpy(data.chelsea().astype(np.float32) / 255)[None]
        settings = Tuning(steps=arguments.steps, batch=1, resolution=arguments.resolution)
        concept, before, after = quick_tune(model, clip, vae, photo, "cat", "<chelsea>", settings, None, None, folder,
                                            Console(), keep=lambda c: str(save(c, build / "stopped.safetensors")))
        path = save(concept, build / "chelsea.safetensors")
        print(f"{path}: {path.stat().st_size / 1024:.1f} KB")
        size = tuple(side // 8 for side in after.shape[1:3])
        strip = [photo, before, after]
        for strength in (0, 0.5, 1):
            edited = apply(model, clip, load(path).at(strength))
            strip.append(picture(*edited, vae, "a photo of <chelsea> in the snow", size, seed=1))
    sheet = [Image.fromarray((p[0].clamp(0, 1) * 255).byte().numpy()).resize((192, 192)) for p in strip]
    out = build / "demo.png"
    Image.fromarray(np.concatenate([np.asarray(p) for p in sheet], axis=1)).save(out)
    print(f"{out}: the photograph; before and after; in the snow at strength 0, .5 and 1")
