"""Random-weight checkpoints of ComfyUI's own SD1, SD2 and SDXL classes, for tests that need a model and have none.

A tiny checkpoint (1 to 2 M UNet weights) is loaded by the stock CheckpointLoaderSimple once `register()` has put
subclasses of the host's SD15, SD20 and SDXL at the front of its list of supported models. A full-size checkpoint has
the shapes of the real models and needs no registration. Both carry the family's CLIP text encoders and a TAESD (4
latent channels, 8 times down), which the stock VAE takes as it takes the big KL autoencoder.

A kind is a family, or a family and a variant: "inpaint" has a 9-channel UNet, "v" is marked for v-prediction the way
the host detects it (it knows none for SD1). A weight depends on the seed and on its own name alone, so that variants
of a family share all they can and all versions of the host get the same weights.

The host is imported when a function is called, not before, and its options (`comfy.cli_args`) are the caller's to set.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import torch

TINY = ("sd1", "sd1-inpaint", "sd2", "sd2-v", "sdxl", "sdxl-inpaint", "sdxl-v")
FULL = ("sd1", "sd2", "sd2-v", "sdxl")


class Unet(NamedTuple):
    """The numbers that tell one UNet from another: `mult` and `depth` (transformer blocks) are per level."""
    channels: int
    mult: tuple
    blocks: int
    depth: tuple
    context: int
    adm: int | None


FULL_UNETS = {
    "sd1": Unet(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 768, None),
    "sd2": Unet(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1024, None),
    "sdxl": Unet(320, (1, 2, 4), 2, (0, 2, 10), 2048, 2816),
}
# Channels are multiples of 32 for the group norms. SD2 has 12 output blocks, because the host reads v-prediction off
# the last, but 3 levels, because a group norm refuses the 1x1 map that a fourth makes of a 64x64 image. SDXL's adm is
# the pooled text and six embedded sizes of 256 each.
TINY_UNETS = {
    "sd1": Unet(32, (1, 2), 1, (1, 1), 64, None),
    "sd2": Unet(32, (1, 1, 2), 3, (1, 1, 0), 96, None),
    "sdxl": Unet(32, (1, 1, 2), 1, (0, 1, 2), 64 + 96, 96 + 6 * 256),
}

# Three text layers, because SD2 and SDXL read the second last one and the host wants more layers than that.
TINY_TEXT = {
    f"clip_{name}_model_config": {
        "hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_hidden_layers": 3,
    }
    for name, width in {"l": 64, "h": 96, "g": 96}.items()
}
V_MARK_SD2 = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@cache
def _classes(tiny):
    """Map family to the host's class for it, or to our tiny subclass of that."""
    from comfy import supported_models as host

    stock = {"sd1": host.SD15, "sd2": host.SD20, "sdxl": host.SDXL}
    return {family: _tiny_class(family, entry) for family, entry in stock.items()} if tiny else stock


def _tiny_class(family, stock):
    from comfy.supported_models_base import ClipTarget

    config, target = _unet_config(family, TINY_UNETS[family]), stock({}).clip_target()

    class Text(target.clip):
        def __init__(self, device, dtype, model_options):
            super().__init__(device=device, dtype=dtype, model_options={**model_options, **TINY_TEXT})

    class Tiny(stock):
        unet_config = {key: config[key] for key in ("model_channels", "context_dim", "adm_in_channels")}
        unet_extra_config = {**stock.unet_extra_config, "num_heads": -1, "num_head_channels": 16}

        def clip_target(self, state_dict=None):
            return ClipTarget(target.tokenizer, Text)

    return Tiny


def register():
    """Let the host recognise tiny checkpoints; a second call changes nothing."""
    from comfy import supported_models as host

    host.models[:0] = [tiny for tiny in _classes(tiny=True).values() if tiny not in host.models]


def unregister():
    """Undo `register`."""
    from comfy import supported_models as host

    host.models[:] = [entry for entry in host.models if entry not in _classes(tiny=True).values()]


def _unet_config(family, unet, in_channels=4):
    """Give the arguments of the host's UNetModel that decide its names and shapes."""
    return dict(
        image_size=32, in_channels=in_channels, out_channels=4, model_channels=unet.channels,
        channel_mult=unet.mult, num_res_blocks=[unet.blocks] * len(unet.mult),
        transformer_depth=[depth for depth in unet.depth for _ in range(unet.blocks)],
        transformer_depth_output=[depth for depth in unet.depth for _ in range(unet.blocks + 1)],
        transformer_depth_middle=max(unet.depth), num_head_channels=32, use_spatial_transformer=True,
        use_linear_in_transformer=family != "sd1", context_dim=unet.context, adm_in_channels=unet.adm,
        num_classes=None if unet.adm is None else "sequential", legacy=False,
    )


def _scale(name, shape):
    """Give the (mean, std) that keeps a forward pass alive and bounded for the weight `name`."""
    if "token_embedding" in name:
        return 0.0, 0.02
    if "position" in name:
        return 0.0, 0.01
    if len(shape) == 1:
        return (1.0, 0.0) if name.endswith("weight") else (0.0, 0.02)
    gain = 1.0 if name.startswith("first_stage_model.") else 0.7  # a TAESD has ReLUs and no norms
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def _plan(kind, tiny):
    """Map every key of a checkpoint of `kind` to the (shape, mean, std) of its tensor, without making any tensor."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.taesd.taesd import TAESD

    family, _, variant = kind.partition("-")
    numbers = (TINY_UNETS if tiny else FULL_UNETS)[family]
    unet_config = _unet_config(family, numbers, 9 if variant == "inpaint" else 4)
    config = _classes(tiny)[family](unet_config)
    unet = UNetModel(**unet_config, device="meta", operations=comfy.ops.disable_weight_init).state_dict()
    text = config.clip_target().clip(device="meta", dtype=torch.float32, model_options={}).state_dict()
    tensors = {
        **config.process_unet_state_dict_for_saving(unet),
        **config.process_clip_state_dict_for_saving(text),
        **config.process_vae_state_dict_for_saving(TAESD().state_dict()),
    }
    unused = ("logit_scale", "position_ids")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(unused)}
    plan = {name: (shape, *_scale(name, shape)) for name, shape in shapes.items()}
    # A TAESD speaks the UNet's latents; these two make it speak the unscaled ones that the host passes to a VAE.
    plan["first_stage_model.vae_scale"] = ((), config.latent_format.scale_factor, 0.0)
    plan["first_stage_model.vae_shift"] = ((), 0.0, 0.0)
    plan["first_stage_model.taesd_decoder.19.bias"] = ((3,), 0.5, 0.0)  # images centred in 0..1, or half were black
    if kind == "sd2-v":
        plan[V_MARK_SD2] = (shapes[V_MARK_SD2], 0.0, 0.2)  # the host takes SD2 for v-prediction if the std is > 0.09
    elif kind == "sdxl-v":
        plan["v_pred"] = ((0,), 0.0, 0.0)
    return plan


def _tensor(name, shape, mean, std, seed):
    generator = torch.Generator().manual_seed(seed + crc32(name.encode()))
    return torch.randn(shape, generator=generator).mul_(std).add_(mean)


def _write(plan, path, seed, dtype):
    """Fill and write one tensor at a time, so that a 7 GB checkpoint needs no more memory than its largest tensor."""
    header, end = {}, 0
    for name, (shape, _, _) in plan.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the tensors start at a multiple of 8
    part = Path(path).with_suffix(".part")  # so that the path exists only when the file is whole
    with part.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, entry in plan.items():
            _tensor(name, *entry, seed).to(dtype).reshape(-1).view(torch.uint8).numpy().tofile(file)
    return part.rename(path)


def build_tiny(kind, seed=0):
    """Build the float32 state dict of a tiny checkpoint of `kind`, one of TINY."""
    return {name: _tensor(name, *entry, seed) for name, entry in _plan(kind, tiny=True).items()}


def save_tiny(kind, path, seed=0, dtype=torch.float32):
    """Write a tiny checkpoint of `kind`, one of TINY, as a safetensors file."""
    return _write(_plan(kind, tiny=True), path, seed, dtype)


def save_full(kind, path, seed=0, dtype=torch.float16):
    """Write a checkpoint of `kind`, one of FULL, in the real model's shapes as a safetensors file of 2 to 7 GB."""
    return _write(_plan(kind, tiny=False), path, seed, dtype)


def load(path):
    """Load a checkpoint as CheckpointLoaderSimple does, to (model, clip, vae)."""
    import comfy.sd
    return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)[:3]


if __name__ == "__main__":
    import sys

    from headless.comfy import enter

    enter(cpu=True)
    kind, path = sys.argv[1:]
    print(save_full(kind, Path(path)))
