"""Where in a picture its concepts acted: what its places read, through one sampling run, of the tokens they opened for.

    a = softmax(q kᵀ / √d)        cross-attention: how much a place reads of each token, by head, layer and step
    heat = mean of Σ a g          over heads, layers and steps, summed over the tokens of the prompt's words; g: gate

Heat 1 would be a place that reads nothing but words for which the gate is open wide. The rows after the last word are
left out: the encoder has put the whole prompt into them, so places of all kinds read them. The attention is computed
a second time beside the model's own, from the same queries and keys, so what the model answers stays as it is.
Letters: b rows of the batch · N places of a layer · n tokens · m pictures · j concepts · H W latent.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .key_lock import gate
from .swap import swapped

RUN = "perfusion_run"  # the name of a Run in the host's transformer_options


def layer_size(places: int, H: int, W: int) -> tuple[int, int] | None:
    """Height and width of a layer with so many places; None if halving H × W, rounded up, never gives as many."""
    while H * W > places:
        H, W = math.ceil(H / 2), math.ceil(W / 2)
    return (H, W) if H * W == places else None


def reading(q: Tensor, k: Tensor, g: Tensor, heads: int) -> Tensor:
    """Heat (N, j) of one row in one layer: queries (N, w), keys (n, w), gates (n, j)."""
    q, k = (x.float().unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k))  # (heads, N or n, w / heads)
    a = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return (a @ g).mean(0)


@contextmanager
def asked(layers: Iterable[nn.Module], told: Callable[[nn.Module, Tensor, Tensor, Tensor], None]):
    """While open, `told` hears of every call of cross-attentions: the layer, queries (b, N, w), keys (b, n, w) and what
    these were made of (b, n, d)."""
    queries = {}

    def query(attention):
        def forward_of(plain):
            def forward(x):
                queries[attention] = plain(x)
                return queries[attention]
            return forward
        return forward_of

    def key(attention):
        def forward_of(plain):
            def forward(x):
                k = plain(x)
                told(attention, queries.pop(attention), k, x)
                return k
            return forward
        return forward_of

    layers = list(layers)
    with swapped([(m.to_q, query(m)) for m in layers] + [(m.to_k, key(m)) for m in layers]):
        yield


class Run:
    """The heat of one sampling run, of m pictures with latents of H × W, and the words that its prompts said.

    `said` has of each prompt, by the id that the host gives it, which rows are words (n), and for a concept's word
    [(word of the prompt, similarity), …] and its weight there; see `gate_reading`.
    """

    def __init__(self, pictures: int, size: tuple[int, int], said: dict[object, tuple[Tensor, dict]]):
        self.pictures, self.size, self.said = pictures, size, said
        self.concepts, self.sums, self.counts = (), {}, 0

    @contextmanager
    def listening(self, x: Tensor, prompts: list, layers: list, concepts: tuple, present: Tensor, of, blend):
        """Gather from one model call: its latents, the ids of its prompts, its cross-attentions, the concepts of its
        edit, which row names which (1 or b, j, on the CPU, or each call waits for the device), what the edit makes of
        an input (see `edited`), and how answers of several edits (b, p, N, j) become one (see `region.Blend`). A call
        for a part of the picture is not gathered."""
        if x.shape[2:] != self.size:
            yield
            return
        self.concepts = concepts
        named = (present.expand(len(x), -1) != 0).float()
        rows = [(row, self.said.get(prompts[row // self.pictures], (torch.ones(1), {}))[0])
                for row in named.any(1).nonzero().flatten().tolist()]

        def told(attention, q, k, context):
            self._gather(q, k, of(context)[2], attention.heads, rows, named, blend)

        with asked(layers, told):
            yield

    def _gather(self, q, k, g, heads, rows, named, blend):
        size = layer_size(q.shape[1], *self.size)
        if size is None:
            return  # another extension has merged places
        if size not in self.sums:
            self.sums[size] = q.new_zeros(self.pictures, q.shape[1], g.shape[-1], dtype=torch.float32)
        for row, words in rows:
            words = words.to(g)[torch.arange(g.shape[1]) % len(words)]  # the host repeats a shorter prompt
            sides = zip(*(t.unflatten(0, (len(named), -1))[row] for t in (q, k, g * words[:, None])))  # p of them
            heat = torch.stack([reading(*side, heads) for side in sides])
            self.sums[size][row % self.pictures] += blend.row(row)(heat[None])[0]
        self.counts = self.counts + named.view(-1, self.pictures, named.shape[-1]).sum(0)

    def heat(self) -> Tensor:
        """Heat (m, j, H, W) on the CPU; 0 where no prompt said the word, and j is 0 where no concept was applied."""
        whole = torch.zeros(self.pictures, len(self.concepts), *self.size)
        for size, found in self.sums.items():
            found = found.cpu().mT.unflatten(-1, size)
            whole += interpolate(found, self.size, mode="bilinear", align_corners=False)
        return whole / self.counts.clamp(min=1)[..., None, None] if self.sums else whole

    def words(self, concept) -> list[tuple[str, float]]:
        """The prompt's words and how far the concept's gate opened for each, 0..1, widest first."""
        said = (found[concept.word] for _, found in self.said.values() if concept.word in found)
        seen, weight = next(said, ([], 0.0))
        g = weight * concept.scale * gate(torch.tensor([s for _, s in seen]), concept.gate_bias, concept.temperature)
        return sorted(zip([word for word, _ in seen], g.tolist()), key=lambda pair: -pair[1])
