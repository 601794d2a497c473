"""Host over ComfyUI's MODEL, CLIP and VAE.

ComfyUI runs nodes under inference mode, so the weights of a checkpoint that was loaded there cannot be saved for a
backward pass: `without_inference` puts an equal clone in each one's place, bit for bit. The text encoder adds its
residuals in place, over what its norms have saved: `own_copies` lets each norm save a copy. (PyTorch's own remedy,
`allow_mutation_on_saved_tensors`, tells tensors apart by their addresses and now and then hands back a wrong one.)
"""

import logging
from contextlib import contextmanager, nullcontext
from functools import partial

import comfy.model_management as memory
import comfy.sample
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_sampling import V_PREDICTION
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import apply as applying
from . import weight_offset
from .covariance import captions, frames, inverse_of
from .file import brief
from .fingerprint import exact, fingerprint, sample
from .host_versions import is_dynamic
from .memory import MARGIN, rehearsed, told
from .prompt import Token, embedding, encoder, superclass_ids, tokenizers, with_word
from .public_encoder import pooled_answers
from .tower import Tower, hash_of
from .tune import Tuning, rehearse

PREVIEW_STEPS, PREVIEW_CFG = 12, 6.0
# Where it cannot be told: peak of forward and backward over what the host reserves to sample the same latents, 8.9
# computed with the formula that it has for flash attention.
TRAINING_OVER_SAMPLING = 9


def without_inference(module: torch.nn.Module):
    """Replace inference tensors in a module by equal ordinary ones, in place, and ask no weight for its gradient."""
    with torch.inference_mode(False):
        for m in module.modules():
            for name, p in m._parameters.items():
                if p is not None and p.is_inference():
                    m._parameters[name] = torch.nn.Parameter(p.clone(), requires_grad=False)
            for name, b in m._buffers.items():
                if b is not None and b.is_inference():
                    m._buffers[name] = b.clone()
        module.requires_grad_(False)  # 0.3.64 leaves that on in a UNet that was loaded outside a prompt


def fixed(patcher):
    """A clone whose weights stay where they are: those that dynamic VRAM streams may be gone on the way back."""
    return patcher.clone(disable_dynamic=True) if is_dynamic(patcher) else patcher.clone()


def load_to_learn(patchers, need: int):
    """Load models whole, with so many bytes free beside them, and with weights that can be saved for the way back."""
    memory.load_models_gpu(list(patchers), memory_required=need, force_full_load=True)
    for patcher in patchers:  # what was moved or merged while loading
        without_inference(patcher.model)


def text_weights(clip) -> dict:
    """What the fingerprint takes of a text encoder's weights and their patches, without those that nothing reads.

    A checkpoint may lack those, and the host leaves them as the memory was. Only SDXL reads a pooled answer, clip_g's,
    and SD2 never reads clip_h's last layer, which diffusers' folders leave out.
    """
    unused = ["clip_l.transformer.text_projection", "clip_h.transformer.text_projection", "logit_scale"]
    if hasattr(clip.cond_stage_model, "clip_h"):
        last = encoder(clip, "clip_h").num_layers - 1
        unused.append(f"clip_h.transformer.text_model.encoder.layers.{last}.")
    weights = {name: w for name, w in clip.patcher.get_key_patches().items() if not any(u in name for u in unused)}
    # in fp16, as which most hosts load what others keep as the file has it: one encoder, one hash
    return {name: (tuple(w.shape), sample(w).half(), patches) for name, ((w, _), *patches) in weights.items()}


def text_key(clip) -> str:
    """The hash of a text encoder and its clip skip, by which its covariance is found."""
    return fingerprint(text_weights(clip), clip.layer_idx)


def encode_chunks(encode, prompts: list[dict]) -> tuple[Tensor, list[list]]:
    """Encodings (b, 77, d) of each tokenised prompt's first chunk in one call, and the first encoder's chunks.

    The host encodes the chunks of one long prompt as a batch; here every chunk is a prompt of its own.
    """
    chunks = {key: [tokens[key][0] for tokens in prompts] for key in prompts[0]}
    x = encode(chunks)
    return x.view(len(prompts), -1, x.shape[-1]), next(iter(chunks.values()))


@contextmanager
def checkpointed(diffusion_model):
    """While open, blocks keep their input only and are computed again on the way back."""

    def again(plain):
        def forward(*args, transformer_options=None, **kwargs):
            if transformer_options is not None:  # the host writes the block's place into it: keep this block's own
                kwargs["transformer_options"] = dict(transformer_options)
            # nothing is drawn in a block, and what has no content (memory.py) has no generator to put back
            return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward

    blocks = [m for m in diffusion_model.modules() if type(m).__name__ in ("BasicTransformerBlock", "ResBlock")]
    own = [(block, vars(block).get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = again(block.forward)
        yield
    finally:
        for block, forward in own:
            vars(block).pop("forward", None)
            if forward:
                block.forward = forward


def way_down(diffusion_model) -> list[torch.nn.Module]:
    """What answers in `Host.features`, in the order in which it does.

    The last layer of each block, because the host calls layers itself and never a block.
    """
    return [block[-1] for block in (*diffusion_model.input_blocks, diffusion_model.middle_block)]


@contextmanager
def own_copies(text):
    """While open, the norms of a text encoder read copies, so that what they save for the way back stays as it is."""
    norms = [m for m in text.modules() if isinstance(m, torch.nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0].clone(), *inputs[1:])) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def any_tune(host, latents: Tensor):
    """The first step of a tune of any picture and word on latents (1, c, h, w), to ask `host.needed` what it takes."""

    def work():
        vectors = {name: torch.zeros(encoder(host.clip, name).transformer.get_input_embeddings().weight.shape[1])
                   for name in host.ids}
        inverse = torch.eye(next(iter(host.projections.values())).weight.shape[1], dtype=torch.float64)
        rehearse(host, host.superclass, "<measured>", vectors, inverse, Tuning(), None, latents)

    return work


class ComfyHost:
    """See `host.Host`. `folder` keeps covariances, for all but the demo; `progress` hears (done, total) while one is
    computed, and `note` a sentence on the memory that a tune takes, before its first step."""

    out_of_memory, tight = torch.cuda.OutOfMemoryError, False

    def __init__(self, model, clip, vae, superclass: str, folder, progress=lambda done, total: None,
                 note=lambda text: None):
        self.base = applying.base_of(model)
        applying.check_clip(clip, self.base)
        self.ids = superclass_ids(clip, superclass)
        self.source, self.clip, self.vae, self.progress, self.note = model, clip, vae, progress, note
        self.superclass = superclass.strip()
        # the demo has its world's captions and their covariance beside it
        self.folder = model.model.model_config.folder if self.base == "creature" else folder
        self.prediction = "v" if isinstance(model.get_model_object("model_sampling"), V_PREDICTION) else "eps"
        self.device = model.load_device
        self.dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
        self.answers = {}  # prompt of plain words -> its encodings, and what SDXL adds to the time embedding

    def learn_on(self, patcher, text):
        """Take the models of these patchers for those that are learnt on."""
        self.patcher, self.text = patcher, text.model
        self.projections = applying.projections(patcher.model.diffusion_model)
        self.attention = weight_offset.attention(patcher.model.diffusion_model)

    @contextmanager
    def blocks(self, tight: bool):
        """While open, the models keep what the way back needs: as little as can be, if `tight`."""
        unet = checkpointed(self.patcher.model.diffusion_model) if tight else nullcontext()
        with unet, own_copies(self.text):
            yield

    def needed(self, rehearsal, tight: bool) -> int:
        """Bytes that a step takes at its peak, beside the weights. Nothing is loaded or changed for it."""
        answers, self.answers = self.answers, {}
        try:
            with torch.inference_mode(False), torch.enable_grad(), self.blocks(tight):
                return rehearsed(rehearsal, [self.patcher.model.diffusion_model, self.text], self.device)
        finally:
            self.answers = answers

    @contextmanager
    def training(self, latents: Tensor, tight: bool = False, rehearsal=None):
        with torch.inference_mode(False), torch.enable_grad():
            patcher, text = fixed(self.source), fixed(self.clip.patcher)
            if any(p.is_inference() for model in (patcher, text) for p in model.model.parameters()):
                memory.unload_all_models()  # unpins memory that belongs to the tensors which are about to go
            for model in (patcher, text):
                without_inference(model.model)
            self.learn_on(patcher, text)
            need = patcher.memory_required([1, *latents.shape[1:]])  # without gradients
            try:
                need = self.needed(rehearsal, tight) if rehearsal else need
            except memory.InterruptProcessingException:  # up to v0.8.0 an Exception
                raise
            except Exception as error:  # other packs' code runs in it, which may want to see numbers
                logging.warning(f"Perfusion: what this takes of memory could not be told. {brief(error)}")
                rehearsal, need = None, need * TRAINING_OVER_SAMPLING
            load_to_learn((patcher, text), int(need * MARGIN))
            free = memory.get_free_memory(self.device)
            self.tight = tight or free < need * MARGIN
            if rehearsal:
                need = self.needed(rehearsal, True) if self.tight and not tight else need
                self.say(told(need, patcher.model_size() + text.model_size(), free, self.tight))
            self.load = partial(load_to_learn, (patcher, text), int(need * MARGIN))
            with self.blocks(self.tight):
                yield

    def say(self, text: str):
        logging.info(f"Perfusion: {text}")
        self.note(text)

    def spare(self):
        memory.unload_all_models()
        memory.soft_empty_cache()

    @contextmanager
    def paused(self):
        """While open, between two steps of `training`, the stock nodes may use the models; then steps can go on."""
        try:
            with torch.no_grad():
                yield
        finally:
            self.load()

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        return self.source.model.process_latent_in(self.vae.encode(images)).float()

    def frames(self) -> list[str]:
        return frames(captions(self.folder), self.superclass)

    def embedding(self, word: str) -> dict[str, Tensor]:
        return embedding(self.clip, word)

    def inverse_covariance(self) -> tuple[Tensor, str, dict]:
        def encode(lines):
            self.check()
            found = [self.clip.tokenize(line, disable_weights=True) for line in lines]  # brackets are brackets here
            x, tokens = encode_chunks(self.clip.encode_from_tokens, found)
            return [row[: self.end(chunk) + 1] for row, chunk in zip(x, tokens)]

        return inverse_of(encode, text_key(self.clip), captions(self.folder), self.folder, self.progress)

    def end(self, chunk) -> int:
        """Place of the first end token in a chunk of (token, weight)."""
        token = next(iter(tokenizers(self.clip).values())).end_token
        return [t for t, _ in chunk].index(token, 1)

    def encode(self, prompts: list[str], word: str, embedding: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        each = [{name: v if v.ndim == 1 else v[k] for name, v in embedding.items()} for k in range(len(prompts))]
        clips = [with_word(self.clip, word, Token(own, self.ids)) for own in each]
        found = [clip.tokenize(prompt) for clip, prompt in zip(clips, prompts)]
        x, chunks = encode_chunks(lambda tokens: self.answer(tokens)[0], found)
        at = [[k for k, (t, _) in enumerate(chunk) if any(t is v for v in own.values())]
              for own, chunk in zip(each, chunks)]
        for prompt, places in zip(prompts, at):
            if not places:
                raise ValueError(f"The caption '{prompt}' is too long: {word} has to be among its first 75 tokens. Say "
                                 "less before it.")
            if len(places) > 1:
                raise ValueError(f"The caption '{prompt}' holds {word} {len(places)} times, and once is needed. Leave "
                                 "only {} where the word goes.")
        return x.to(self.device), torch.tensor(at)[:, 0]

    def answer(self, tokens):
        """Encodings and pooled answer, as CLIP.encode_from_tokens gives them, without moving any model."""
        self.text.reset_clip_options()
        if self.clip.layer_idx is not None:
            self.text.set_clip_options({"layer": self.clip.layer_idx})
        self.text.set_clip_options({"execution_device": self.clip.patcher.load_device})
        return self.text.encode_token_weights(tokens)

    @torch.no_grad()
    def plain(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Encodings (1, n, d) of a prompt of plain words, and its pooled answer, kept for the next time."""
        if prompt not in self.answers:
            context, pooled, *_ = self.answer(self.clip.tokenize(prompt))
            self.answers[prompt] = context.to(self.device), pooled
        return self.answers[prompt]

    def errors(self, latents: Tensor, noise: Tensor, time: Tensor, context: Tensor, prompt: str) -> Tensor:
        model, b = self.patcher.model, len(latents)
        sampling = model.model_sampling
        # noise levels by the host's own schedule: a distilled or continuous one counts its steps otherwise
        sigma = torch.tensor([sampling.percent_to_sigma(1 - t) for t in time.tolist()]).to(latents).clamp_min(0.01)
        x = sampling.noise_scaling(sigma, noise, latents)
        conds = model.extra_conds(
            cross_attn=context, pooled_output=self.plain(prompt)[1], noise=x, latent_image=latents, device=x.device,
            width=x.shape[3] * 8, height=x.shape[2] * 8, prompt_type="positive",
        )
        conds = {name: c.process_cond(batch_size=b, area=None, device=x.device).cond for name, c in conds.items()}
        # flash and sage attention, if the user has chosen one, give no gradient
        options = {"optimized_attention_override": lambda chosen, *args, **kwargs: attention_pytorch(*args, **kwargs)}
        denoised = model.apply_model(x, sigma, transformer_options=options, **conds | {"c_crossattn": context})
        # apply_model answers in x0; the error of ε is 1/σ of that, the error of v √(1/σ² + 1/σ_data²)
        weight = 1 / sigma**2 + (0 if self.prediction == "eps" else 1 / sampling.sigma_data**2)
        return weight.view(b, 1, 1, 1) * (denoised - latents) ** 2

    @torch.no_grad()
    def features(self, latents: Tensor, noise: Tensor, time: Tensor) -> list[Tensor]:
        context = self.plain("")[0].expand(len(latents), -1, -1)
        with pooled_answers(way_down(self.patcher.model.diffusion_model)) as found:
            self.errors(latents, noise, time, context, "")
        return found

    def check(self):
        memory.throw_exception_if_processing_interrupted()


def tower_of(clip_vision) -> Tower:
    """What the encoder reads of a CLIP_VISION. Raises ValueError where it is none of CLIP's own kind."""
    vision = getattr(clip_vision.model, "vision_model", None)
    if getattr(getattr(vision, "embeddings", None), "class_embedding", None) is None:
        raise ValueError(f"The connected CLIP vision model is a {type(clip_vision.model).__name__} without a class "
                         "token, which SigLIP and DINO models are. Load the one that the domain was trained with, "
                         "usually CLIP-ViT-H-14, with Load CLIP Vision.")

    def states(x):
        memory.load_model_gpu(clip_vision.patcher)
        return vision(x.to(clip_vision.load_device), intermediate_output="all")[1].unbind(1)

    return Tower(clip_vision.image_size, hash_of(vision.state_dict()), states)


def picture(model, clip, vae, prompt: str, size: tuple[int, int], seed: int) -> Tensor:
    """A picture (1, H, W, 3) as the stock nodes make it, in few steps, for previews; `size` is (H, W) in latents."""
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, ""))
    latent = torch.zeros(1, model.model.latent_format.latent_channels, *size)
    noise = comfy.sample.prepare_noise(latent, seed)
    latent = comfy.sample.sample(model, noise, PREVIEW_STEPS, PREVIEW_CFG, "euler", "normal", positive, negative,
                                 latent, seed=seed, disable_pbar=True,
                                 # older hosts look for a cancel nowhere else on this way
                                 callback=lambda *step: memory.throw_exception_if_processing_interrupted())
    return vae.decode(latent).cpu()


def tune_key(model, clip, vae, *settings) -> str | None:
    """The cache key of a tune: everything that it depends on. None where the graph holds what cannot be hashed."""
    patches = {name: type(patch).__name__ for name, patch in model.object_patches.items()}
    wrappers = sorted({type(w).__name__ for kind in model.wrappers.values() for ws in kind.values() for w in ws})
    other = [name for p in (model, clip.patcher) for name in (*p.injections, *p.weight_wrapper_patches)]
    known = "manual_cast_dtype", "model_sampling", "ConceptWrapper"
    unknown = [name for name in (*patches, *wrappers, *other) if name not in known]
    if unknown:
        logging.info(f"Perfusion: the result is not kept for a re-queue, as {', '.join(unknown)} cannot be hashed.")
        return None
    sampling = model.get_model_object("model_sampling")
    kinds = [kind.__name__ for kind in type(sampling).__mro__]
    settings = [exact(part) if torch.is_tensor(part) else part for part in settings]  # one pixel of a mask counts
    return fingerprint(model.get_key_patches(), text_weights(clip), vae.patcher.get_key_patches(), clip.layer_idx,
                       patches, wrappers, str(model.get_model_object("manual_cast_dtype")), kinds, sampling.sigmas,
                       *settings)
