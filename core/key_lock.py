"""Key-locked, gated rank-1 editing of cross-attention (Perfusion, Tewel et al. 2023, arXiv 2305.01644).

    s = i*ᵀ C⁻¹ x / i*ᵀ C⁻¹ i*      similarity of a text encoding x to the concept: 1 at i*, 0 at what is C⁻¹-orthogonal
    g = σ((s − β) / τ)               gate: how far the edit opens for this token
    c = M⁻¹ s,  Mⱼₖ = dⱼ · iₖ        joint projection onto several concepts, exact (eq. 4); c = s for one
    V = W (x − Σⱼ cⱼ i*ⱼ) + Σⱼ gⱼ o*ⱼ                 values: what the concept is, learned
    K = W (x − Σⱼ cⱼ i*ⱼ + Σⱼ gⱼ key_inputⱼ)          keys: where it goes, locked to the superclass (o* = W key_input)
    c ← λ c, g ← λ g                                  how much of the edit: 1 in the paper, and while learning

Two observations keep this file short. The stored direction d = C⁻¹ i* / (i*ᵀ C⁻¹ i*) is all that is needed of C, for
one concept and for many: M is the Gram matrix of the paper with its rows divided by the energies. And by linearity the
whole edit but Σ g o* happens on the input, so nothing ever reads W: LoRA, fp8 and streamed weights compose.

Everything is computed in fp32 (a bf16 similarity moves a gate of slope 2.5 by .013) and cast at the end.
Letters: b batch · n tokens · d text width · j concepts.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .swap import swapped

# The gate while learning, and while making pictures. The paper's (.75, .10; .70, .15) stand for an i* that is the mean
# over short templates; ours is the mean over prompts of all kinds (bench/research.md has the figures).
TRAIN_BIAS, TRAIN_TEMPERATURE = 0.45, 0.10
BIAS, TEMPERATURE = 0.30, 0.10
APART = 1e-5  # of 1 − cosine: less, and two concepts are one to the text encoder


def second_moment(encodings) -> tuple[Tensor, int]:
    """Uncentred covariance C (d, d) in fp64 of an iterable of (n, d) token encodings, and how many tokens it saw.

    Its scale cancels in the edit; which tokens enter does not (Perfusion, appendix C: start to first end token here).
    """
    total, tokens = 0, 0
    for x in encodings:
        x = x.double()
        total, tokens = total + x.T @ x, tokens + len(x)
    return total / tokens, tokens


def invert(covariance: Tensor, ridge: float = 0.0) -> Tensor:
    """C⁻¹ (d, d) in fp64, symmetric. `ridge`, in units of C's mean eigenvalue, is for samples too small to span d.

    Raises ValueError where C is not invertible.
    """
    covariance = covariance.double()
    covariance = (covariance + covariance.T) / 2
    covariance = covariance + ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        raise ValueError(
            "The captions do not span the text encoder's space, so their covariance cannot be inverted. "
            "Use more, and more varied, captions."
        )
    return torch.cholesky_inverse(factor)


def direction(inverse: Tensor, target_input: Tensor) -> tuple[Tensor, float]:
    """C⁻¹ i* / (i*ᵀ C⁻¹ i*) (d) in fp64, and the energy i*ᵀ C⁻¹ i*, for i* of shape (d)."""
    i = target_input.double()
    p = inverse @ i
    energy = p @ i
    return p / energy, energy.item()


def unit(directions: Tensor, target_inputs: Tensor) -> Tensor:
    """Directions (j, d) whose similarity at their own i* (j, d) is 1 again, after a file has rounded both to fp16."""
    return directions / (directions * target_inputs).sum(-1, keepdim=True)


def gate(similarity: Tensor, bias, temperature) -> Tensor:
    """σ((s − β) / τ): eq. 3's soft gate, of any shape that broadcasts."""
    return torch.sigmoid((similarity - bias) / temperature)


def cosines(M: Tensor) -> Tensor:
    """Cosines (j, j) of the concepts' i* under C⁻¹, from their overlap M."""
    return torch.sign(M) * (M * M.T).clamp_min(0).sqrt()


def overlap(directions: Tensor, target_inputs: Tensor) -> Tensor:
    """M (j, j) in fp64: dⱼ · iₖ. Raises ValueError where one of the (j, d) concepts is another one, or a mixture."""
    M = directions.double() @ target_inputs.double().T
    R = cosines(M)
    if torch.linalg.eigvalsh(R)[0] <= APART:  # 1 − cosine, for two
        closest = R.abs().fill_diagonal_(0)
        a, b = sorted(divmod(closest.argmax().item(), len(M)))
        raise ValueError(
            f"Concepts {a + 1} and {b + 1} are the same to the text encoder (cosine {closest.max():.6f}), or one of "
            f"the {len(M)} is a mixture of the others, so they cannot be told apart in one picture. Remove one, or "
            "tune one of them again with another seed."
        )
    return M


def joint(M: Tensor) -> Tensor:
    """For every subset of j concepts the inverse of M on it, identity elsewhere: (2^j, j, j), in the order of `subset`.

    A row of the batch projects onto the concepts that its own prompt names, and onto no other. A table built once
    needs no solve, and no wait for the device, in the sampling loop.
    """
    j = len(M)
    members = (torch.arange(2**j)[:, None] >> torch.arange(j)) % 2  # (2^j, j) of 0 and 1
    eye = torch.eye(j, dtype=M.dtype)
    return torch.linalg.inv(eye + members[:, :, None] * (M - eye) * members[:, None, :])


def subset(present: Tensor) -> Tensor:
    """Index (b) into `joint` of the concepts that each row of `present` (b, j) names."""
    return ((present != 0).long() << torch.arange(present.shape[1], device=present.device)).sum(1)


@dataclass
class Edit:
    """The edit of one model call, every tensor in fp32 on the model's device; it computes in their dtype.

    `present` (b or 1, j) is 0 where a row's prompt does not name the concept, else the word's weight in the prompt:
    what a word adds to attention grows with its weight, and so does what the concept adds.
    """

    target_input: Tensor  # (j, d) i*
    key_input: Tensor  # (j, d)
    direction: Tensor  # (j, d)
    bias: Tensor  # (j) β
    temperature: Tensor  # (j) τ
    target_output: dict[str, Tensor]  # value projection -> (j, d_out) o*
    present: Tensor  # (b, j)
    joint: Tensor  # (2^j, j, j)
    scale: Tensor | float = 1.0  # (j) λ

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What keys read and what values read, both (b, n, d) in x's dtype, and the gates (b, n, j) in the edit's."""
        full = x.to(self.direction.dtype)
        if len(self.present) not in (1, len(x)):
            raise ValueError(
                f"Another node gives the model {len(x)} rows of text where the prompts have {len(self.present)}, so it "
                "cannot be told which of them hold a concept's word. Use that node or the concept, not both."
            )
        said = (full != 0).any(-1, keepdim=True)  # a prompt that was zeroed out says nothing, whatever its mark
        present = self.present[:, None] * said  # (b, n, j)
        s = full @ self.direction.T  # (b, n, j)
        g = gate(s, self.bias, self.temperature) * present * self.scale
        c = (self.joint[subset(self.present)] @ (s * (present != 0)).mT).mT * self.scale
        rest = full - c @ self.target_input
        return (rest + g @ self.key_input).to(x.dtype), rest.to(x.dtype), g


@contextmanager
def edited(projections: dict[str, torch.nn.Module], edit: Edit):
    """While the block is open the projections (names to `to_k` and `to_v` modules) answer as edited.

    Their `forward` is swapped and put back, whatever happens inside; weights and state dict are never touched. The
    edited input is computed where it is first met and reused while the same tensor arrives. Yields the function that
    meets an input: under gradient checkpointing it is to be called before the model, because a block that is computed
    a second time has to find what it found the first time.
    """
    seen = [None, None]  # the input last met, and what the edit makes of it

    def of(x):
        if seen[0] is not x:
            seen[:] = x, edit(x)
        return seen[1]

    def key(plain):
        return lambda x: plain(of(x)[0])

    def value(target_output):
        def forward_of(plain):
            def forward(x):
                _, rest, g = of(x)
                out = plain(rest)
                return out + (g @ target_output).to(out.dtype)

            return forward

        return forward_of

    outputs = edit.target_output
    with swapped((module, value(outputs[name]) if name in outputs else key) for name, module in projections.items()):
        yield of
