"""Host: what the loops need from the program that holds the model.

Letters: b batch · n tokens · m pictures · d text width · c h w latent.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Host(Protocol):
    """A model with its text encoders and autoencoder, in the words of the loops. Tensors are fp32 on `device`."""

    base: str  # a key of concept.BASES
    prediction: str  # "eps" or "v"
    device: torch.device
    dtype: torch.dtype  # what the UNet computes in
    projections: dict[str, torch.nn.Module]  # every cross-attention to_k and to_v
    attention: dict[str, torch.nn.Module]  # every to_q, to_k and to_v of self- and cross-attention
    out_of_memory: type[BaseException]
    tight: bool  # whether the last training was in as little memory as can be

    def training(self, latents: Tensor, tight: bool = False,
                 rehearsal: Callable[[], object] | None = None) -> AbstractContextManager:
        """Everything that gradients need, for steps on latents (1, c, h, w), undone on leaving. `tight` asks for as
        little memory as can be; a host that sees how much there is may do so unasked, where it is told by `rehearsal`,
        which does one step on things of its own, what steps take (memory.py)."""

    def spare(self) -> None:
        """Give back memory that is only held for later."""

    def latents(self, images: Tensor) -> Tensor:
        """(m, c, h, w) from images (m, H, W, 3) in 0..1."""

    def inverse_covariance(self) -> tuple[Tensor, str, dict]:
        """C⁻¹ (d, d) in fp64 on the CPU, its hash, and what is to be said about it (captions, tokens, ridge)."""

    def frames(self) -> list[str]:
        """Captions of the same list that say something of a thing, with {} where the thing is; see `covariance`."""

    def embedding(self, word: str) -> dict[str, Tensor]:
        """The superclass word's row (d of the encoder) of each text encoder's embedding table. Raises ValueError."""

    def encode(self, prompts: list[str], word: str, embedding: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Text encodings (b, n, d) of prompts that hold `word` once, with gradient to `embedding`, and the word's
        position (b) in each. An embedding is (d) for all prompts or (b, d), one for each. Raises ValueError where a
        prompt holds the word more often, or beyond the encoder's reach."""

    def errors(self, latents: Tensor, noise: Tensor, time: Tensor, context: Tensor, prompt: str) -> Tensor:
        """Squared error (b, c, h, w) of the model's own prediction target at noise levels `time` (b) in [0, 1).

        `latents` and `noise` are (b, c, h, w), `context` is (b, n, d). `prompt` holds the superclass word; what the
        model is conditioned on beside `context` is read from it.
        """

    def features(self, latents: Tensor, noise: Tensor, time: Tensor) -> list[Tensor]:
        """What the UNet answers to the empty prompt on its way down, mean over positions, each (b, width), without
        gradient; see `errors`. It is asked for at the first convolution, at each residual layer with its attention, at
        what halves the picture, and in the middle."""

    def check(self) -> None:
        """Raise the host's own exception where the user has cancelled."""
