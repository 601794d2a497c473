"""A small vision tower in transformers' own class, for the encoder that turns a picture into a word.

Trained as CLIP is (Radford et al. 2021, arXiv 2103.00020): pictures and their captions find each other in a batch. What
captions never say CLIP learns from millions of them; a world of a few words has to be asked for it, so pictures of one
subject in two contexts find each other as well. Both can be had for a real domain.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from . import mini_data, mini_models, world

BATCH, PROJECTION = 64, 128
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, as ComfyUI applies


def build() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(
        image_size=128, patch_size=16, hidden_size=160, intermediate_size=640, num_hidden_layers=6,
        num_attention_heads=5, projection_dim=PROJECTION, hidden_act="quick_gelu"))


class Contrast(nn.Module):
    """The tower, a text encoder of its own, and the projections in which pictures and captions meet."""

    def __init__(self):
        super().__init__()
        self.tower, self.text = build(), mini_models.text_encoder(len(mini_models.WORDS) + 2)
        self.of_picture, self.of_subject = (nn.Linear(160, PROJECTION, bias=False) for _ in range(2))
        self.of_text = nn.Linear(mini_models.WIDTH, PROJECTION, bias=False)
        self.scale = nn.Parameter(torch.tensor([2.3, 2.3]))


def normalised(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (m, 3, 128, 128) in 0..1 as the tower reads them."""
    mean, std = (torch.tensor(t, device=pictures.device).view(3, 1, 1) for t in (MEAN, STD))
    return (pictures - mean) / std


def loss(contrast: Contrast, data: dict[str, torch.Tensor]):
    """The loss of a step, as `mini_loop.train` asks for it."""

    def meet(a, b, scale):
        logits = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T * scale.exp().clamp_max(100)
        own = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def step(generator):
        rows = torch.randint(len(data["pictures"]), (BATCH,), generator=generator)
        ids = mini_models.compact_ids(mini_data.captions(data, rows, generator))
        again, _ = world.render(data["superclass"][rows], data["identity"][rows], world.contexts(BATCH, generator))
        pictures = torch.cat([data["pictures"][rows].float() / 255, again])
        device = contrast.scale.device
        seen = contrast.tower(normalised(pictures.to(device))).pooler_output
        ends = (ids == ids.max()).int().argmax(1)
        said = contrast.text(ids.to(device)).last_hidden_state[torch.arange(BATCH), ends]
        captions = meet(contrast.of_picture(seen[:BATCH]), contrast.of_text(said), contrast.scale[0])
        subjects = meet(*contrast.of_subject(seen).split(BATCH), contrast.scale[1])
        return captions + subjects, {"captions": captions.item(), "subjects": subjects.item()}

    return step
