"""The demo's miniature of Stable Diffusion as ComfyUI's MODEL, CLIP, VAE and CLIP_VISION, and its pictures.

Its files are a diffusers folder (unet, vae, text_encoder, tokenizer) with a vision tower (vision) beside them. The
host's loaders know checkpoints by their shapes, and not this one; what they build for one they know is built here from
the same classes, and no table of the host learns of it. Of the text encoder's 49,408 rows the file holds those of the
tokenizer's words, then start and end.
"""

import json
from fractions import Fraction
from functools import partial
from pathlib import Path

import comfy.model_management as memory
import numpy as np
import safetensors.torch
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_base import ModelType
from comfy.sd import CLIP, VAE
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDTokenizer
from comfy.supported_models_base import BASE, ClipTarget
from comfy.utils import calculate_parameters, unet_to_diffusers, weight_dtype
from PIL import Image
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from .host_versions import is_dynamic, known, new_patcher

TABLE = "text_model.embeddings.token_embedding.weight"
FIRST, ALL = "mimi", "all"  # of the pictures
ROWS, START = 49408, 49406  # of CLIP's table, which the host's classes fix; the end token is the last


def read(path: Path) -> dict | torch.Tensor:
    """A .json, .safetensors or .png file of the folder, the last as (1, H, W, 3) in 0..1.

    Raises ValueError with what to do where it is absent or damaged.
    """
    try:
        if path.suffix == ".png":
            return torch.from_numpy(np.array(Image.open(path).convert("RGB"), dtype=np.float32) / 255)[None]
        return json.loads(path.read_bytes()) if path.suffix == ".json" else safetensors.torch.load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"The demo model is a folder with unet, vae, text_encoder, tokenizer and vision, and its file {path} is "
            f"{'damaged' if path.exists() else 'missing'}. Restore the folder from the pack's repository, large files "
            "included."
        ) from error


class Mult(Fraction):
    """A level's channels over those of the first. The host multiplies the two, and layers want whole numbers."""

    def __mul__(self, channels):
        return int(super().__mul__(channels))

    __rmul__ = __mul__


def unet_config(config: dict) -> dict:
    """The arguments of the host's UNetModel for a diffusers config with attention on every level."""
    channels, blocks = config["block_out_channels"], config["layers_per_block"]
    return dict(
        image_size=32, in_channels=config["in_channels"], out_channels=config["out_channels"],
        model_channels=channels[0], channel_mult=[Mult(c, channels[0]) for c in channels],
        num_res_blocks=[blocks] * len(channels), transformer_depth=[1] * len(channels) * blocks,
        transformer_depth_output=[1] * len(channels) * (blocks + 1), transformer_depth_middle=1,
        num_heads=-1, num_head_channels=channels[0] // config["attention_head_dim"][0],  # which counts heads
        use_spatial_transformer=True, use_linear_in_transformer=config["use_linear_projection"],
        context_dim=config["cross_attention_dim"], adm_in_channels=None, legacy=False,
    )


class Creature(BASE):
    """What the host wants to know of a model. Its schedule of noise is the host's default, SD's; its answers are v."""

    perfusion_base = "creature"  # by which `apply` knows it
    unet_extra_config = {}  # all is in the folder's config
    memory_usage_factor = 1.0  # as SD1.5

    def __init__(self, folder: Path):
        super().__init__(unet_config(read(folder / "unet/config.json")))
        self.folder = folder
        self.latent_format.latent_channels = self.unet_config["in_channels"]
        self.latent_format.scale_factor = read(folder / "vae/config.json")["scaling_factor"]

    def inpaint_model(self):  # as which the host takes every UNet of more than four channels
        return False

    def model_type(self, state_dict, prefix=""):
        return ModelType.V_PREDICTION


def load_model(folder: Path, disable_dynamic: bool = False):
    """The MODEL, in the type and on the device that the host's loader picks."""
    config = Creature(folder)
    stored = read(folder / "unet/diffusion_pytorch_model.safetensors")
    state = {host: stored[name] for name, host in unet_to_diffusers(config.unet_config).items() if name in stored}
    device, types = memory.get_torch_device(), config.supported_inference_dtypes
    dtype = memory.unet_dtype(model_params=calculate_parameters(state), supported_dtypes=types,
                              weight_dtype=weight_dtype(state))
    config.set_inference_dtype(dtype, memory.unet_manual_cast(dtype, device, types))
    offload = memory.unet_offload_device()
    model = config.get_model(state, device=offload)
    patcher = new_patcher(model, device, offload, disable_dynamic)
    model.diffusion_model.load_state_dict(state, assign=is_dynamic(patcher))
    patcher.cached_patcher_init = load_model, (folder,)  # from where the host makes copies with weights of their own
    return patcher


def load_clip(folder: Path, disable_dynamic: bool = False) -> CLIP:
    """The text encoder, its table at full height, and its tokenizer."""
    config, state = read(folder / "text_encoder/config.json"), read(folder / "text_encoder/model.safetensors")
    table = state[TABLE]
    state[TABLE] = table.new_zeros(ROWS, table.shape[1])
    state[TABLE][: len(table) - 2], state[TABLE][START:] = table[:-2], table[-2:]
    # nothing reads this one, and without it the host would leave it as the memory was
    state["text_projection.weight"] = torch.eye(table.shape[1], dtype=table.dtype)
    read(folder / "tokenizer/tokenizer.json")  # says it better than the tokenizer would
    words = partial(SDTokenizer, tokenizer_path=str(folder / "tokenizer"), tokenizer_class=PreTrainedTokenizerFast,
                    tokenizer_args={"local_files_only": True}, embedding_size=table.shape[1])
    options = {"clip_l_model_config": config, "initial_device": torch.device("cpu")}  # to be filled before it moves
    clip = CLIP(ClipTarget(partial(SD1Tokenizer, tokenizer=words), SD1ClipModel),
                parameters=calculate_parameters(state), model_options=options,
                **known(CLIP, disable_dynamic=disable_dynamic))
    clip.load_sd(state)
    clip.patcher.cached_patcher_init = load_text, (folder,)
    return clip


def load_text(folder: Path, disable_dynamic: bool = False):
    """The patcher of the text encoder alone."""
    return load_clip(folder, disable_dynamic).patcher


def load_vae(folder: Path) -> VAE:
    """The autoencoder, a TAESD, on latents without the scale: MODEL's latent format has that."""
    state = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for name, tensor in read(folder / "vae/diffusion_pytorch_model.safetensors").items():
        part, _, number, rest = name.split(".", 3)
        state[f"taesd_{part}.{int(number) + (part == 'decoder')}.{rest}"] = tensor  # the host's clamp is a layer
    return VAE(sd=state)


def load_vision(folder: Path) -> ClipVisionModel:
    """The vision tower. What projects its answer to meet text is not kept, and is no more than a cut here."""
    config, stored = read(folder / "vision/config.json"), read(folder / "vision/model.safetensors")
    vision = ClipVisionModel(str(folder / "vision/config.json"))
    state = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in stored.items()}
    state["visual_projection.weight"] = torch.eye(config["projection_dim"], config["hidden_size"])
    vision.load_sd(state)
    return vision


def load(folder) -> tuple:
    """(MODEL, CLIP, VAE, CLIP_VISION) of a miniature's folder. Raises ValueError where a file is absent or damaged."""
    return tuple(part(Path(folder)) for part in (load_model, load_clip, load_vae, load_vision))


def names(folder) -> list[str]:
    """The pictures of a miniature's folder, the one that its workflows start with first."""
    found = (path.stem for path in Path(folder, "pictures").glob("*.png"))
    return sorted(found, key=lambda name: (name != FIRST, name))


def load_picture(folder, name: str) -> torch.Tensor:
    """One of these pictures (1, H, W, 3), or "all" of them (m, H, W, 3). Raises ValueError as `read` does."""
    wanted = names(folder) if name == ALL else [name]
    return torch.cat([read(Path(folder, "pictures", f"{one}.png")) for one in wanted])
