"""Where concepts acted, as pictures: heat over the grey picture, and under it the words that opened the gate."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

SMALLEST = 512  # pixels of a map's shorter side: the words under it are to be read
PIXELS = 8  # of a place of the latents, where there is no picture to lay the heat over
COLOURS = torch.tensor([[0, 0, 0], [120, 10, 80], [230, 80, 20], [255, 200, 40], [255, 255, 220]]) / 255
OPEN = 0.05  # of a gate: what is less is not named


def coloured(heat: Tensor) -> Tensor:
    """Colours (H, W, 3) of heat (H, W) in 0..1, from black through red to white."""
    at = heat.clamp(0, 1) * (len(COLOURS) - 1)
    low = at.long().clamp(max=len(COLOURS) - 2)
    return torch.lerp(COLOURS[low], COLOURS[low + 1], (at - low)[..., None])


def laid_over(heat: Tensor, picture: Tensor) -> Tensor:
    """A picture (H, W, 3), grey and half as bright, under the colours of heat (H, W): hot places cover it."""
    grey = picture[..., :3].mean(-1, keepdim=True) / 2
    return torch.lerp(grey.expand(-1, -1, 3), coloured(heat), 0.85 * heat.clamp(0, 1).sqrt()[..., None])


def strip(width: int, word: str, peak: float, words: list[tuple[str, float]]) -> Tensor:
    """Two lines of text (h, width, 3): the concept and its heat, and the words with how far they opened its gate."""
    font = ImageFont.load_default(16)
    shown = "  ".join(f"{text or '(rest)'} {g:.0%}" for text, g in words if g >= OPEN)
    lines = [f"{word}  up to {peak:.1%} of what a place reads" if peak else f"{word or 'no concept'}  acted nowhere",
             f"gate: {shown or 'no word of the prompt opened it'}"]
    picture = Image.new("RGB", (width, 52), "#202020")
    draw = ImageDraw.Draw(picture)
    for k, line in enumerate(lines):
        draw.text((8, 5 + 22 * k), line, ("white", "#f0a030")[k], font)
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)


def maps(acted, images: Tensor | None) -> Tensor:
    """Maps (m · j, H, W, 3) of what a run kept (see `Acted`), a picture's concepts one after the other.

    A map's coolest place is dark and its hottest one bright; how hot that is stands under it. Raises ValueError where
    `images` (m, H, W, 3) are not as many as the run made.
    """
    m, _, *size = acted.heat.shape
    if images is None:
        images = torch.zeros(m, *(PIXELS * side for side in size), 3)
    if len(images) != m:
        raise ValueError(f"The sampler made {m} pictures and {len(images)} came as image. Connect what VAE Decode "
                         "makes of the same latents, or nothing.")
    H, W = images.shape[1:3]
    larger = max(1, -(-SMALLEST // min(H, W)))
    H, W = H * larger, W * larger
    pictures = interpolate(images.float().cpu().movedim(-1, 1), (H, W), mode="nearest").movedim(1, -1)
    drawn = []
    for picture, heat in zip(pictures, acted.heat):
        found = [(word, words, h) for (word, words), h in zip(acted.words, heat)]
        for word, words, h in found or [("", [], torch.zeros(size))]:
            peak = h.max().item()
            h = (h - h.min()) / (peak - h.min() or 1)
            h = interpolate(h[None, None], (H, W), mode="bilinear", align_corners=False)[0, 0]
            drawn.append(torch.cat([laid_over(h, picture), strip(W, word, peak, words)]))
    return torch.stack(drawn)
