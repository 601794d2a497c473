"""The miniature's denoiser and text encoder, trained together on the world's latents and captions.

The UNet predicts v (Salimans & Ho 2022) on SD's own schedule. Two times in three are drawn where shapes are decided,
logit-normal around the middle (Esser et al. 2024, arXiv 2403.03206). Subjects weigh more than what is behind them, and
what they wear or hold, which is small, the most. One caption in ten is empty, for guidance. A word in fifty is the
unknown one, so that it means nothing in particular.

A text encoder that is trained along puts what a prompt says into its padding: two thirds of the attention went there,
and a hundredth to the word for the subject. Whether a model reads its padding depends on just that, and those that
artists use had a frozen one (Toker et al. 2025, "Padding Tone"). So at the end of the training the padding mostly says
what it says in an empty prompt, and the UNet learns to read words.
"""

import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from . import mini_data, mini_models

BATCH = 16  # for each worker
EMPTY, FORGOTTEN = 0.1, 0.02
EVEN = 1 / 3  # of the times, drawn evenly
WEIGHTS = 2, 2, 5  # of the subjects, the second ones and what is worn or held, beside the 1 of every place


class Denoiser(nn.Module):
    """What is trained: the UNet and the text encoder, so that one optimiser holds both."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        if not torch.accelerator.is_available():
            unet.set_attn_processor(AttnProcessor())  # a quarter faster on a CPU than the fused attention's way back

    def forward(self, x, t, ids, without=None):
        """v (b, c, h, w). Where `without` (b, n) says so, the UNet reads of a token what an empty prompt has there."""
        context = self.text_encoder(ids).last_hidden_state
        if without is not None:
            empty = self.text_encoder(mini_models.compact_ids([""]).to(ids.device)).last_hidden_state
            context = context.where(~without[..., None], empty)
        return self.unet(x, t, context).sample


@torch.no_grad()
def encode(vae, pictures: torch.Tensor) -> torch.Tensor:
    """Latents (m, 8, 16, 16) of pictures (m, 3, 128, 128) in bytes."""
    found = []
    for x in pictures.split(32):
        x = (x.to(vae.device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(vae.device.type, torch.bfloat16):
            found.append(vae.encoder(x).half().cpu())
    return torch.cat(found)


def loss(denoiser: Denoiser, data: dict[str, torch.Tensor], scaling_factor: float, padless: float = 0):
    """The loss of a step, as `mini_loop.train` asks for it; `padless` is how often the padding says nothing."""
    schedule = DDIMScheduler(**mini_models.SCHEDULE)
    unknown = mini_models.WORDS.index(mini_models.UNKNOWN)
    words = len(mini_models.WORDS)

    def step(generator):
        device = next(denoiser.parameters()).device
        rows = torch.randint(len(data["latents"]), (BATCH,), generator=generator)
        said = mini_data.captions(data, rows, generator)
        empty = torch.rand(BATCH, generator=generator) < EMPTY
        ids = mini_models.compact_ids(["" if e else caption for e, caption in zip(empty.tolist(), said)])
        forgotten = (torch.rand(ids.shape, generator=generator) < FORGOTTEN) & (ids < words)
        ids = ids.masked_fill(forgotten, unknown)
        x = data["latents"][rows].float() * scaling_factor
        noise = torch.randn(x.shape, generator=generator)
        even = torch.rand(BATCH, generator=generator)
        middle = torch.randn(BATCH, generator=generator).sigmoid()
        t = (even.where(torch.rand(BATCH, generator=generator) < EVEN, middle) * 1000).long().clamp_max(999)
        noisy, target = schedule.add_noise(x, noise, t), schedule.get_velocity(x, noise, t)
        masks = data["masks"][rows].float() / 255
        weight = 1 + torch.einsum("bkhw, k -> bhw", masks, torch.tensor(WEIGHTS).float())[:, None]
        without = None
        if padless:
            after = (ids == ids.max()).cumsum(1) > 1  # the first end token is no padding
            without = (after & (torch.rand(BATCH, 1, generator=generator) < padless)).to(device)
        v = denoiser(noisy.to(device), t.to(device), ids.to(device), without).float()
        return ((v - target.to(device)).square() * weight.to(device)).mean() / weight.mean().item()

    return step
