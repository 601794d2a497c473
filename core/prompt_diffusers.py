"""The concept's word in the text encoders of a diffusers pipeline, so that its prompts understand `<mimi>`.

A word becomes its vector where a text encoder looks its tokens up: a hook on the embedding table, for the length of
one call, through which gradients flow; the superclass's token holds the place. What is read is what the pipeline
reads: the last layer after the final norm (SD2's folders leave out the layer that ComfyUI skips), for SDXL the second
last of both encoders without it. `encoders` are (tokenizer, model) by the name that ComfyUI has for them: clip_l,
clip_g, clip_h. Letters: b batch · n tokens · d text width.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .fingerprint import sample

Encoders = dict[str, tuple]


@dataclass(frozen=True)
class Token:
    """What stands for a word: per text encoder a vector (d), or none if the concept is off, and the superclass id."""

    vector: dict[str, Tensor]
    superclass: dict[str, int]


def text_weights(encoders: Encoders) -> dict:
    """What the fingerprint takes of the text encoders' weights: what ComfyUI's host takes, under ComfyUI's names."""
    found = {}
    for encoder, (_, model) in encoders.items():
        for name, w in model.state_dict().items():
            name = name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
            found[f"{encoder}.transformer.{name}"] = tuple(w.shape), sample(w).half(), []
    return found


def superclass_ids(encoders: Encoders, superclass: str) -> dict[str, int]:
    """The superclass word's token id per text encoder. Raises ValueError where it is not one word of one token."""
    word, found = superclass.strip(), {}
    if not word or len(word.split()) > 1:
        raise ValueError(
            f"The superclass is one plain word for the kind of thing, such as cat, person or toy; got '{superclass}'."
        )
    for name, (tokenizer, _) in encoders.items():
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"The text encoder takes '{word}' in {len(ids)} pieces or does not know it, and the superclass has to "
                "be one that it knows. Use a more common word for the same kind, such as animal, person or toy."
            )
        found[name] = ids[0]
    return found


def tokenise(tokenizer, prompts: list[str], ids: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Token ids (b, 77) of prompts, with the id given for each word, and which word (b, 77) it is: from 1, else 0."""
    words = re.compile(f"({'|'.join(map(re.escape, ids)) or '(?!)'})")
    found = []
    for prompt in prompts:
        row = [(tokenizer.bos_token_id, 0)]
        for part in words.split(prompt):
            row += ([(ids[part], list(ids).index(part) + 1)] if part in ids else
                    [(i, 0) for i in tokenizer(part, add_special_tokens=False).input_ids])
        row = row[: tokenizer.model_max_length - 1] + [(tokenizer.eos_token_id, 0)]
        found.append(row + [(tokenizer.pad_token_id, 0)] * (tokenizer.model_max_length - len(row)))
    return torch.tensor(found).unbind(-1)


@contextmanager
def spoken(model, marks: Tensor, vectors: list[Tensor | None]):
    """While open, a text encoder reads vectors, (d) or (b, d), where `marks` (b, n) has their number, from 1."""

    def answer(table, inputs, rows):
        for k, vector in enumerate(vectors, 1):
            if vector is not None:
                rows = torch.where((marks == k)[..., None].to(rows.device), vector[..., None, :].to(rows), rows)
        return rows

    hook = model.get_input_embeddings().register_forward_hook(answer)
    try:
        yield
    finally:
        hook.remove()


def read(encoders: Encoders, prompts: list[str], words: dict[str, Token]) -> tuple[Tensor, Tensor]:
    """Text encodings (b, n, d) of prompts, and which of the words (b, n) stands where: its number from 1, or 0."""
    answers, second_last = [], "clip_g" in encoders
    for name, (tokenizer, model) in encoders.items():
        ids, marks = tokenise(tokenizer, prompts, {word: token.superclass[name] for word, token in words.items()})
        with spoken(model, marks, [token.vector.get(name) for token in words.values()]):
            out = model(ids.to(model.device), output_hidden_states=second_last)
        answers.append(out.hidden_states[-2] if second_last else out.last_hidden_state)
    return torch.cat(answers, -1), marks


@torch.no_grad()
def pooled(encoders: Encoders, prompts: list[str], words: dict[str, Token]) -> Tensor:
    """SDXL's pooled answer (b, d) to prompts with the superclass word: past every key and value, where it goes, the
    learnt vector would act outside the gate."""
    tokenizer, model = encoders["clip_g"]
    ids, _ = tokenise(tokenizer, prompts, {word: token.superclass["clip_g"] for word, token in words.items()})
    return model(ids.to(model.device)).text_embeds
