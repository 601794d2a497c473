"""Host over a diffusers pipeline: the same work without ComfyUI, and a second opinion on every number of it.

Noise levels are ComfyUI's, in their logarithm linear between the schedule's; the UNet is told the nearest whole k:

    log σ = lerp(log σₖ) at k = 999 t     x = (x₀ + σ ε) / √(1 + σ²)     v = (ε − σ x₀) / √(1 + σ²)

Letters: b batch · n tokens · d text width · m pictures · c h w latent · j concepts.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from . import weight_offset
from .acting_diffusers import acting, texts_of
from .concept import Concept
from .covariance import captions, frames, inverse_of
from .fingerprint import fingerprint
from .joint_edit import check_fit
from .prompt_diffusers import Encoders, Token, pooled, read, superclass_ids, text_weights, tokenise
from .public_encoder import pooled_answers
from .unet_names import comfy_name

FAMILIES = {768: "sd1", 1024: "sd2", 128: "creature"}  # by the width of the text that the UNet reads
ENCODERS = {"sd1": ["clip_l"], "creature": ["clip_l"], "sd2": ["clip_h"], "sdxl": ["clip_l", "clip_g"]}
DARKEST = 4.8973451890853435e-08  # ᾱ where a schedule ends in nothing but noise, as ComfyUI sets it


def load(folder) -> StableDiffusionPipeline:
    """The demo's miniature as a pipeline in fp32. Its text encoder's table holds the rows of the tokenizer's words,
    then start and end, whose ids are CLIP's; between them CLIP has words that the miniature never saw, zero here."""
    folder = Path(folder)
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")).eval()
    state = {name.removeprefix("text_model."): t.float()
             for name, t in safetensors.torch.load_file(folder / "text_encoder" / "model.safetensors").items()}
    rows, table = state["embeddings.token_embedding.weight"], torch.zeros_like(text.get_input_embeddings().weight)
    table[: len(rows) - 2], table[text.config.bos_token_id :] = rows[:-2], rows[-2:]
    text.load_state_dict(state | {"embeddings.token_embedding.weight": table})
    pipe = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        text_encoder=text, tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def base_of(pipe) -> str:
    """The family that a pipeline belongs to, a key of BASES. Raises ValueError for any other architecture."""
    if isinstance(pipe, StableDiffusionXLPipeline):
        return "sdxl"
    width = pipe.unet.config.cross_attention_dim
    if width not in FAMILIES:
        raise ValueError(
            f"Perfusion edits cross-attention of SD1.5, SD2.x and SDXL; this {type(pipe).__name__} has a UNet that "
            f"reads text of width {width}, where {', '.join(map(str, FAMILIES))} are known. Load a pipeline of one of "
            "these families."
        )
    return FAMILIES[width]


def attention(unet) -> dict[str, torch.nn.Module]:
    """Every `to_q`, `to_k` and `to_v` of a UNet by the name that ComfyUI has for it (SD1.5: 96, SDXL: 420)."""
    layers = unet.config.layers_per_block
    return {comfy_name(name, layers): module for name, module in weight_offset.attention(unet).items()}


def projections(unet) -> dict[str, torch.nn.Module]:
    """Every cross-attention `to_k` and `to_v` (SD1.5: 32, SDXL: 140); see `attention`."""
    return {name: module for name, module in attention(unet).items() if name.endswith(("attn2.to_k", "attn2.to_v"))}


def way_down(unet) -> list[torch.nn.Module]:
    """What answers in `Host.features`, in the order in which it does."""
    layers = [unet.conv_in]
    for block in unet.down_blocks:
        layers += [*getattr(block, "attentions", block.resnets), *(block.downsamplers or ())]
    return [*layers, unet.mid_block]


def encoders(pipe) -> Encoders:
    """The pipeline's text encoders by the name that ComfyUI has for them: (tokenizer, model)."""
    names = ENCODERS[base_of(pipe)]
    return {name: (getattr(pipe, f"tokenizer{end}"), getattr(pipe, f"text_encoder{end}"))
            for name, end in zip(names, ("", "_2"))}


def added(text_embeds: Tensor, height: int, width: int) -> dict[str, Tensor]:
    """What SDXL's UNet is told beside the text: the pooled answers (b, d), and the size in pixels, uncropped."""
    size = text_embeds.new_tensor([[height, width, 0, 0, height, width]])
    return {"text_embeds": text_embeds, "time_ids": size.expand(len(text_embeds), -1)}


def words_of(pipe, concepts: Sequence[Concept]) -> dict[str, Token]:
    """What each concept's word becomes on this pipeline. Raises ValueError where one does not fit it or another."""
    words, found = {}, encoders(pipe)
    widths = {name: m.out_features for name, m in projections(pipe.unet).items() if name.endswith("to_v")}
    for k, concept in enumerate(concepts):
        check_fit(concept, base_of(pipe), widths, found, [c for c in concepts[:k] if not c.off])
        if concept.word in words:
            raise ValueError(
                f"Two of the applied concepts are called {concept.word}, so a prompt could not say which is meant. "
                "Tune one of them with another word, or apply only one."
            )
        ids = superclass_ids(found, concept.superclass)
        tables = {name: model.get_input_embeddings().weight.detach() for name, (_, model) in found.items()}
        plain = {name: table[ids[name]].float() for name, table in tables.items()}
        vector = {} if concept.off else concept.word_vector(plain)
        words[concept.word] = Token(vector, ids)
    return words


@torch.no_grad()
def encode_prompts(pipe, prompts: list[str], concepts: Sequence[Concept] = ()) -> tuple[Tensor, Tensor]:
    """Text encodings (b, n, d) of prompts that may hold the concepts' words, and where in them (b, n, j) stand those of
    concepts that are not off. The word of one that is off becomes its superclass word."""
    encodings, marks = read(encoders(pipe), prompts, words_of(pipe, concepts))
    on = torch.tensor([k for k, concept in enumerate(concepts, 1) if not concept.off], dtype=torch.long)
    return encodings, (marks[..., None] == on).float().to(encodings.device)


@torch.no_grad()
def pictures(pipe, prompts: list[str], concepts: Sequence[Concept] = (), negative: str = "", steps: int = 20,
             guidance: float = 6.0, seeds: Sequence[int] | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """Pictures (b, H, W, 3) in 0..1, one of each prompt, by the pipeline's own sampler.

    `seeds` are one a prompt, 0, 1, 2 … unless given; `size` is (H, W), the pipeline's own unless given.
    """
    options, at, texts = {}, [], []
    for kind, lines in ("negative_", [negative] * len(prompts)), ("", prompts):
        options[f"{kind}prompt_embeds"], named = encode_prompts(pipe, lines, concepts)
        at.append(named)
        words = words_of(pipe, concepts)
        texts.append(texts_of(encoders(pipe), lines, concepts, words, options[f"{kind}prompt_embeds"]))
        if base_of(pipe) == "sdxl":
            options[f"{kind}pooled_prompt_embeds"] = pooled(encoders(pipe), lines, words)
    # the pipeline's rows are those of negative prompts, then positive ones; without guidance the latter alone
    both = guidance > 1
    rows = torch.cat(at) if both else at[1]
    texts = {back: torch.cat([texts[0][back], text]) if both else text for back, text in texts[1].items()}
    height, width = size or (None, None)
    last = len(pipe.scheduler.alphas_cumprod) - 1
    with acting(pipe.unet, projections(pipe.unet), concepts, rows, texts, last):
        made = pipe(
            **options, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))], output_type="pt",
        ).images
    return made.movedim(1, -1).float()  # BCHW -> BHWC


def places(prompts: list[str], word: str, marks: Tensor) -> Tensor:
    """The word's position (b) in each prompt, of whose tokens `marks` (b, n) has 1 for it."""
    for prompt, found in zip(prompts, marks.sum(1).tolist()):
        if not found:
            raise ValueError(f"The caption '{prompt}' is too long: {word} has to be among its first 75 tokens. Say "
                             "less before it.")
        if found > 1:
            raise ValueError(f"The caption '{prompt}' holds {word} {found} times, and once is needed. Leave "
                             "only {} where the word goes.")
    return marks.argmax(1)


class DiffusersHost:
    """See `host.Host`. `folder` is where covariances are kept; `progress` hears (done, total) while one is computed."""

    out_of_memory, tight = torch.cuda.OutOfMemoryError, False

    def __init__(self, pipe, superclass: str, folder, progress=lambda done, total: None):
        self.base, self.encoders = base_of(pipe), encoders(pipe)
        self.ids = superclass_ids(self.encoders, superclass)
        self.pipe, self.folder, self.progress, self.superclass = pipe, folder, progress, superclass.strip()
        self.prediction = {"epsilon": "eps", "v_prediction": "v"}[pipe.scheduler.config.prediction_type]
        self.device, self.dtype = pipe.unet.device, pipe.unet.dtype
        self.projections, self.attention = projections(pipe.unet), attention(pipe.unet)
        alphas = pipe.scheduler.alphas_cumprod.double().clamp_min(DARKEST)
        self.log_sigmas = ((1 - alphas) / alphas).log() / 2
        self.answers = {}  # prompt of plain words -> its encodings, and what SDXL adds to the time embedding

    @contextmanager
    def training(self, latents: Tensor, tight: bool = False, rehearsal=None):
        models = self.pipe.unet, *(model for _, model in self.encoders.values())
        weights = [(w, w.requires_grad) for model in models for w in model.parameters()]
        unet, self.tight = self.pipe.unet, tight or self.pipe.unet.is_gradient_checkpointing
        ours = self.tight and not unet.is_gradient_checkpointing
        try:
            for w, _ in weights:
                w.requires_grad_(False)
            if ours:
                unet.enable_gradient_checkpointing()
            yield
        finally:
            if ours:
                unet.disable_gradient_checkpointing()
            for w, asked in weights:
                w.requires_grad_(asked)

    def spare(self):
        torch.cuda.empty_cache()

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        found = vae.encode((images.movedim(-1, 1) * 2 - 1).to(vae.device, vae.dtype))  # BHWC -> BCHW
        found = found.latents if isinstance(vae, AutoencoderTiny) else found.latent_dist.mode()
        return found.float() * vae.config.scaling_factor

    def frames(self) -> list[str]:
        return frames(captions(self.folder), self.superclass)

    def embedding(self, word: str) -> dict[str, Tensor]:
        tables = {name: model.get_input_embeddings().weight for name, (_, model) in self.encoders.items()}
        return {name: tables[name][i].detach().float().cpu().clone()
                for name, i in superclass_ids(self.encoders, word).items()}

    def inverse_covariance(self) -> tuple[Tensor, str, dict]:
        tokenizer, _ = next(iter(self.encoders.values()))

        @torch.no_grad()
        def encode(lines):
            x, (ids, _) = read(self.encoders, lines, {})[0].float(), tokenise(tokenizer, lines, {})
            ends = (ids == tokenizer.eos_token_id).int().argmax(1)
            return [row[: end + 1] for row, end in zip(x, ends)]

        key = fingerprint(text_weights(self.encoders), None)  # ComfyUI's clip skip: none is set
        return inverse_of(encode, key, captions(self.folder), self.folder, self.progress)

    def encode(self, prompts: list[str], word: str, embedding: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, marks = read(self.encoders, prompts, {word: Token(embedding, self.ids)})
        return x.float().to(self.device), places(prompts, word, marks)

    def places(self, prompts: list[str], word: str) -> Tensor:
        """The word's position (b) in each prompt, by their tokens alone. Raises ValueError as `encode` does."""
        tokenizer, _ = next(iter(self.encoders.values()))
        return places(prompts, word, tokenise(tokenizer, prompts, {word: 0})[1])

    @torch.no_grad()
    def plain(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        """Encodings (1, n, d) of a prompt of plain words, and for SDXL its pooled answer, kept for the next time."""
        if prompt not in self.answers:
            context = read(self.encoders, [prompt], {})[0].float().to(self.device)
            self.answers[prompt] = context, pooled(self.encoders, [prompt], {}) if self.base == "sdxl" else None
        return self.answers[prompt]

    def errors(self, latents: Tensor, noise: Tensor, time: Tensor, context: Tensor, prompt: str) -> Tensor:
        b, more = len(latents), {}
        if self.base == "sdxl":
            size = (side * self.pipe.vae_scale_factor for side in latents.shape[2:])
            more = added(self.plain(prompt)[1].expand(b, -1), *size)
        k = time.double().cpu() * (len(self.log_sigmas) - 1)
        log_sigma = self.log_sigmas[k.floor().long()].lerp(self.log_sigmas[k.ceil().long()], k.frac())
        nearest = (log_sigma[:, None] - self.log_sigmas).abs().argmin(1).to(self.device)
        sigma = log_sigma.exp().to(latents).view(b, 1, 1, 1)
        shrink = (1 + sigma**2).rsqrt()
        x = (latents + sigma * noise) * shrink
        target = noise if self.prediction == "eps" else (noise - sigma * latents) * shrink
        found = self.pipe.unet(x.to(self.dtype), nearest, context, added_cond_kwargs=more).sample
        return (found.float() - target) ** 2

    @torch.no_grad()
    def features(self, latents: Tensor, noise: Tensor, time: Tensor) -> list[Tensor]:
        context = self.plain("")[0].expand(len(latents), -1, -1)
        with pooled_answers(way_down(self.pipe.unet)) as found:
            self.errors(latents, noise, time, context, "")
        return found

    def check(self):
        """Nobody cancels here but with Ctrl-C, which raises by itself."""
