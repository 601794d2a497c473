"""A miniature of Stable Diffusion in the libraries' own classes, and how it is kept on disk.

It is a diffusers folder (unet, vae, text_encoder, tokenizer, scheduler) with one difference: of the text encoder's
49,408 rows only those of the world's words are stored, in the order of the tokenizer, then start and end. Whoever loads
it puts these where CLIP has them, at 49,406 and 49,407, which ComfyUI's classes fix.
"""

from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from . import world

UNKNOWN = "<unk>"
WORDS = (UNKNOWN, *world.WORDS)
ROWS, START, END = 49408, 49406, 49407
WIDTH, LAYERS = 128, 2  # of the text encoder
CHANNELS = 8  # of the latents; four lose the colours of things that are only a few latents wide
UNET = dict(
    sample_size=16, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(96, 128), layers_per_block=1,
    cross_attention_dim=WIDTH,
    down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    attention_head_dim=(3, 4),  # heads of 32 channels: the name is a known mistake of the library
)
SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction")


def text_encoder(rows: int) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=rows, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=77, hidden_act="quick_gelu",
        bos_token_id=START, eos_token_id=END, pad_token_id=END,
    ))


def tokenizer() -> PreTrainedTokenizerFast:
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {word: k for k, word in enumerate(WORDS)} | {start: START, end: END}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, START), (end, END)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=start, eos_token=end, pad_token=end,
                                   unk_token=UNKNOWN, model_max_length=77)


@cache
def _tokenize():
    return tokenizer()


def compact_ids(captions: list[str]) -> torch.Tensor:
    """Ids (b, 77) of captions in the compact table: start and end follow the words."""
    ids = _tokenize()(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    return ids.where(ids < START, ids - START + len(WORDS))


def build() -> dict[str, torch.nn.Module]:
    """The networks with random weights; the text encoder has the compact table."""
    return {"unet": UNet2DConditionModel(**UNET), "vae": AutoencoderTiny(latent_channels=CHANNELS),
            "text_encoder": text_encoder(len(WORDS) + 2)}


def save(folder: Path, unet, vae, text_encoder, scaling_factor: float):
    """Write the miniature as a diffusers folder, in fp16."""
    vae.register_to_config(scaling_factor=scaling_factor)
    for name, module in (("unet", unet), ("vae", vae)):
        module.half().save_pretrained(folder / name)
    place = folder / "text_encoder"
    text_encoder.config.vocab_size = ROWS
    text_encoder.config.save_pretrained(place)
    # with the prefix that files of CLIP have always had, and that ComfyUI's classes want
    state = {f"text_model.{name.removeprefix('text_model.')}": t.half().contiguous()
             for name, t in text_encoder.state_dict().items() if "position_ids" not in name}
    safetensors.torch.save_file(state, place / "model.safetensors")
    tokenizer().save_pretrained(folder / "tokenizer")
    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
