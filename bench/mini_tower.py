"""A small vision tower in transformers' own class, for the encoder that turns a picture into a word.

Trained as CLIP is (Radford et al. 2021, arXiv 2103.00020): pictures and their captions find each other in a batch. What
captions never say CLIP has learnt from 400 million of them, and there are too few here: so the tower is told the
numbers of training identities as well. With captions and pairs of pictures of one subject alone it learnt hues and
nothing of shape, after 180,000 pictures.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..core.tower import MEAN, STD
from . import mini_data, mini_models, world
from .reader import BELIEF
from .train_reader import factor_loss

BATCH, PROJECTION = 128, 128


def build() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(
        image_size=128, patch_size=16, hidden_size=160, intermediate_size=640, num_hidden_layers=6,
        num_attention_heads=5, projection_dim=PROJECTION, hidden_act="quick_gelu"))


class Contrast(nn.Module):
    """The tower, a text encoder of its own, the projections in which pictures and captions meet, and what reads a
    subject's numbers off the tower."""

    def __init__(self):
        super().__init__()
        self.tower, self.text = build(), mini_models.text_encoder(len(mini_models.WORDS) + 2)
        self.of_picture = nn.Linear(160, PROJECTION, bias=False)
        self.of_text = nn.Linear(mini_models.WIDTH, PROJECTION, bias=False)
        self.of_subject = nn.Linear(160, len(world.SUPERCLASSES) * BELIEF)  # the first one's numbers
        self.scale = nn.Parameter(torch.tensor(2.3))


def normalised(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (m, 3, 128, 128) in 0..1 as the tower reads them."""
    mean, std = (torch.tensor(t, device=pictures.device).view(3, 1, 1) for t in (MEAN, STD))
    return (pictures - mean) / std


def loss(contrast: Contrast, data: dict[str, torch.Tensor]):
    """The loss of a step, as `mini_loop.train` asks for it."""

    def step(generator):
        rows = torch.randint(len(data["pictures"]), (BATCH,), generator=generator)
        ids = mini_models.compact_ids(mini_data.captions(data, rows, generator))
        device = contrast.scale.device
        seen = contrast.tower(normalised(data["pictures"][rows].to(device).float() / 255)).pooler_output
        ends = (ids == ids.max()).int().argmax(1)
        said = contrast.text(ids.to(device)).last_hidden_state[torch.arange(BATCH), ends]
        a, b = (F.normalize(x.float(), dim=-1) for x in (contrast.of_picture(seen), contrast.of_text(said)))
        logits, own = a @ b.T * contrast.scale.exp().clamp_max(100), torch.arange(BATCH, device=device)
        captions = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        believed, factors = contrast.of_subject(seen).float().chunk(len(world.SUPERCLASSES), 1), 0
        for k, name in enumerate(world.SUPERCLASSES):
            of = data["superclass"][rows] == k
            if of.any():
                part = factor_loss(name, believed[k][of.to(device)], data["identity"][rows[of]].to(device))
                factors = factors + part * of.float().mean()
        return captions + 3 * factors, {"captions": captions.item(), "factors": factors.item()}

    return step
