"""The miniature's autoencoder: diffusers' AutoencoderTiny (ComfyUI's TAESD), 128 pixels to 8 × 16 × 16, from scratch.

Trained on crops, where the subjects weigh more than what is behind them. Noise on the latents and a pull towards zero
make them smooth and about one in size, so that a small denoiser can draw them.
"""

import torch
import torch.nn.functional as F

CROP, BATCH = 64, 8  # pixels; crops for each worker and step
NOISE, PULL = 0.08, 1e-3
EDGES, BROAD = 0.5, 4.0  # weights of the differences between neighbours, and of blocks' mean colours


def loss(vae, data):
    """The loss of a step, as `mini_loop.train` asks for it."""
    pictures, masks, device = data["pictures"], data["masks"], vae.device

    def step(generator):
        rows = torch.randint(len(pictures), (BATCH,), generator=generator)
        at = torch.randint((128 - CROP) // 8 + 1, (BATCH, 2), generator=generator) * 8
        x = torch.stack([pictures[r, :, y : y + CROP, x : x + CROP] for r, (y, x) in zip(rows, at.tolist())])
        m = torch.stack([masks[r, :, y // 8 : (y + CROP) // 8, x // 8 : (x + CROP) // 8].sum(0)
                         for r, (y, x) in zip(rows, at.tolist())])
        x = (x.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)  # as both hosts give it
        weight = 1 + 2 * F.interpolate(m[:, None].to(device).float() / 255, CROP)
        z = vae.encoder(x)
        noise = torch.randn(z.shape, generator=generator).to(z) * NOISE
        difference = (vae.decoder(z + noise).float() - x) / 2
        pixels = (weight * (difference.abs() + difference.square())).mean()
        edges = sum((weight * (d.diff(dim=k, append=d.narrow(k, -1, 1))).abs()).mean()
                    for d in (difference,) for k in (2, 3))
        broad = F.avg_pool2d(difference, 8).square().mean()
        mse = difference.detach().square().mean().item()
        return pixels + EDGES * edges + BROAD * broad + PULL * z.float().square().mean(), {
            "mse": mse, "std": z.detach().float().std().item()}

    return step
