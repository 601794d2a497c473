"""What a concept's gate sees of a prompt: each of its words, and how similar the text encoder makes it to the concept.

A similarity depends on the prompt and on what was learnt, not on the dial, so whoever has them can tell how far the
gate opens for every word at any strength: σ((similarity − β) / τ). A word of several tokens counts as its most similar
one. The rows after the last word, the end of the text and its padding, are one entry without a text: the encoder has
put the whole prompt into them, so the gate may open there too.
"""

import torch
from torch import Tensor


def word_rows(chunks, tokenizer) -> Tensor:
    """Which rows (n) of an encoding are of the prompt's words: none of the start, the end and the padding."""
    return torch.tensor([tokenizer.tokens_start <= k < _end(chunk, tokenizer)
                         for chunk in chunks for k in range(len(chunk))])


def _end(chunk, tokenizer) -> int:
    ends = (k for k, (t, _) in enumerate(chunk) if not torch.is_tensor(t) and t == tokenizer.end_token)
    return next(ends, len(chunk))


def similarities(chunks, encoded: Tensor, direction: Tensor, words: dict[str, Tensor], tokenizer) -> list:
    """[(word, similarity), …] of a prompt in its order; the rest of it last, as ("", similarity).

    `chunks` are the rows' tokens, (id or vector, weight), of one text encoder; `encoded` (n, d) is what the model gets
    of them; `words` gives the vectors that stand for words, and `tokenizer` the texts of the ids.
    """
    s = (encoded.float().cpu() @ direction).tolist()
    names, texts = {id(vector): word for word, vector in words.items()}, tokenizer.inv_vocab
    ends = any(text.endswith("</w>") for text in texts.values())  # a vocabulary of whole words marks no ends
    found, rest, row = [], [], 0
    for chunk in chunks:
        said, last, begun = [t for t, _ in chunk], _end(chunk, tokenizer), False
        for k in range(tokenizer.tokens_start, last):
            t = said[k]
            text = names.get(id(t), "embedding") + "</w>" if torch.is_tensor(t) else texts[t]
            if begun:
                found[-1] = found[-1][0] + text.removesuffix("</w>"), max(found[-1][1], s[row + k])
            else:
                found.append((text.removesuffix("</w>"), s[row + k]))
            begun = ends and not text.endswith("</w>")
        rest += s[row + last : row + len(chunk)]
        row += len(chunk)
    return [*found, ("", max(rest, default=0.0))]
