"""The methods that Perfusion is measured against, on the same host, captions, noise and schedule.

Each learns an embedding for the word, and beside it
    textual-inversion   nothing (Gal et al. 2022, arXiv 2208.01618)
    lora                rank-4 updates W + BA of every attention projection (Hu et al. 2021, arXiv 2106.09685)
    custom-diffusion    keys and values of cross-attention (Kumari et al. 2023, arXiv 2212.04488)
    dreambooth          every weight of the UNet (Ruiz et al. 2023, arXiv 2208.12242)
    e4t-full            the same, from an encoder's embedding and weight offsets (Gal et al. 2023, arXiv 2302.12228)
    e4t-tokens          nothing, from an encoder's embedding
Prior preservation is left out of all of them: no method here sees more than the pictures of its concept.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.prompt_diffusers import Token, read
from ..core.weight_offset import Offset, modulate

RANK = 4
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LowRank(nn.Module):
    """W + scale · BA, zero at first; the scale is the strength that an artist gives it, 1 while it is learnt."""

    scale = 1.0

    def __init__(self, weight: Tensor):
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter((torch.randn(RANK, columns) / RANK).to(weight))
        self.B = nn.Parameter(weight.new_zeros(rows, RANK))

    def forward(self, weight):
        return weight + self.scale * self.B @ self.A


class Peer:
    """One run of a peer: what is learnt, one step of learning it, and the UNet while it is on. It begins from an
    embedding (d of each text encoder) and the weights under offsets, by attention weight.

    `learning_rate` is of the weights, or of the embedding where nothing else is learnt; beside weights the embedding
    learns at `embedding_learning_rate`.
    """

    def __init__(self, method: str, host, word: str, learning_rate: float, embedding_learning_rate: float, templates,
                 embedding: dict[str, Tensor], offsets: dict[str, Offset]):
        self.host, self.word, self.templates = host, word, templates
        self.unet = host.pipe.unet
        self.embedding = {name: v.detach().to(host.device).requires_grad_() for name, v in embedding.items()}
        self.before = {name: p.detach().clone() for name, p in self.unet.named_parameters()}
        self.low_rank = []
        with torch.no_grad():
            for name, offset in offsets.items():
                host.attention[name].weight.copy_(modulate(host.attention[name].weight, offset))
        if method == "lora":
            torch.manual_seed(0)
            for name, module in list(self.unet.named_modules()):
                if "attn" in name and name.endswith(ATTENTION):
                    parametrize.register_parametrization(module, "weight", LowRank(module.weight))
                    self.low_rank.append(module)
            learnt = [p for m in self.low_rank for p in m.parametrizations.weight[0].parameters()]
        elif method == "custom-diffusion":
            learnt = [module.weight for module in host.projections.values()]
        else:
            learnt = list(self.unet.parameters()) if method in ("dreambooth", "e4t-full") else []
        for p in learnt:
            p.requires_grad_()
        alone = not learnt
        self.bytes = 2 * sum(p.numel() for p in (*learnt, *self.embedding.values()))  # in fp16
        self.optimizer = torch.optim.AdamW([
            {"params": learnt, "lr": learning_rate},
            {"params": list(self.embedding.values()), "lr": learning_rate if alone else embedding_learning_rate},
        ][alone:], weight_decay=0)

    def step(self, latents: Tensor, weight: Tensor, sample, generator: torch.Generator) -> float:
        """One optimiser step over a batch of (picture, template, time), as `tune.Lesson.step` takes it."""
        texts = [self.templates[template] for _, template, _ in sample]
        context, _ = self.host.encode([t.replace("{}", self.word) for t in texts], self.word, self.embedding)
        latents, weight = (t[[picture for picture, _, _ in sample]] for t in (latents, weight))
        noise = torch.cat([torch.randn(latents[:1].shape, generator=generator) for _ in sample]).to(latents.device)
        times = torch.tensor([t for _, _, t in sample], device=latents.device)
        errors = self.host.errors(latents, noise, times, context, "")  # which only SDXL reads
        loss = ((weight * errors).mean(1).sum((1, 2)) / weight.sum((1, 2, 3))).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def draw(self, prompts: list[str], seeds: list[int], sampling: int, guidance: float, others={}) -> Tensor:
        """Pictures (b, H, W, 3) of b prompts that may hold the word, or one of others by its embedding, each with its
        own of b seeds."""
        known = {self.word: self.embedding} | others
        words = {word: Token(embedding, self.host.ids) for word, embedding in known.items()}
        texts, empty = (read(self.host.encoders, lines, words)[0] for lines in (prompts, [""] * len(prompts)))
        made = self.host.pipe(
            prompt_embeds=texts, negative_prompt_embeds=empty, num_inference_steps=sampling, guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="pt").images
        return made.movedim(1, -1)  # BCHW -> BHWC

    def undo(self):
        """Put the UNet's weights back."""
        for module in self.low_rank:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        with torch.no_grad():
            for name, p in self.unet.named_parameters():
                p.requires_grad_(False).copy_(self.before[name])


@contextmanager
def learning(*arguments):
    """A Peer, undone on leaving."""
    peer = Peer(*arguments)
    try:
        yield peer
    finally:
        peer.undo()
