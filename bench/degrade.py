"""Pictures made a little worse, as files and screens make them: to train the reader, and to ask how it stands that.

Letters: m pictures (m, 3, H, W) in 0..1.
"""

import torch
import torch.nn.functional as F
from torchvision.io import decode_jpeg, encode_jpeg

from . import world
from .world_scene import background


def blurred(pictures, sigma):
    """Pictures (m, 3, H, W) behind Gaussians of sigma (m,) pixels, or one for all."""
    m, reach = len(pictures), 8
    sigma = torch.as_tensor(sigma, dtype=torch.float).expand(m)
    kernel = (-.5 * (torch.arange(-reach, reach + 1) / sigma[:, None]).square()).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    x = F.pad(pictures, (reach,) * 4, mode="reflect").flatten(0, 1)[None].float()
    x = F.conv2d(F.conv2d(x, kernel[..., None], groups=3 * m), kernel[:, :, None], groups=3 * m)
    return x[0].unflatten(0, (m, 3))


def jpeg(pictures, quality):
    """Pictures (m, 3, H, W) written as JPEG of a quality, one for all or a list of m, and read again."""
    quality = [quality] * len(pictures) if isinstance(quality, int) else quality
    whole = (pictures.clamp(0, 1) * 255).round().byte()
    return torch.stack([decode_jpeg(encode_jpeg(x, q)) for x, q in zip(whole, quality)]).float() / 255


def degraded(pictures, context, generator):
    """Pictures for training: most of them a little worse, a few without any subject, so that doubt is learnt too."""
    def some(share):
        return (torch.rand(m, generator=generator) < share).nonzero()[:, 0]

    def even(shape, low, high):
        return low + (high - low) * torch.rand(shape, generator=generator)

    m = len(pictures)
    x = pictures.clone()
    rows = some(1 / 24)
    x[rows] = background(*(context[rows, k] for k in (world.BACKGROUND, world.STYLE, world.VARIANT)))
    rows = some(1 / 48)
    x[rows] = even((len(rows), 3, 1, 1), 0, 1).expand(-1, -1, *x.shape[2:])
    rows = some(.35)
    if len(rows):
        sigma = torch.where(torch.rand(len(rows), generator=generator) < .2, even(len(rows), 1.5, 4.),
                            even(len(rows), .4, 1.5))
        x[rows] = blurred(x[rows], sigma)
    x = x * even((m, 3, 1, 1), .97, 1.03) + even((m, 3, 1, 1), -.02, .02)
    rows = some(.3)
    x[rows] += torch.randn(x[rows].shape, generator=generator) * even((len(rows), 1, 1, 1), 0, .05)
    x = x.clamp(0, 1)
    rows = some(.35)
    if len(rows):
        x[rows] = jpeg(x[rows], torch.randint(20, 95, (len(rows),), generator=generator).tolist())
    left, up = torch.randint(-3, 4, (2,), generator=generator).tolist()  # one step for the batch: cheap, and enough
    return F.pad(x, (3, 3, 3, 3), mode="replicate")[:, :, 3 + up:3 + up + x.shape[2], 3 + left:3 + left + x.shape[3]]
