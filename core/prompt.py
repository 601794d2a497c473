"""The concept's word inside ComfyUI's CLIP, so that the stock text-encode nodes understand `<mimi>`.

A clone of CLIP carries two shallow copies. Its tokenizer lets a prompt hold vectors where the word stands. Its
`cond_stage_model` answers as always, and says in its third value which concepts the prompt names: the host copies that
into the conditioning, and `model_conds` reach the model's wrappers, one value a row. Prompts without the word take the
untouched code path, and CLIP.clone() keeps both copies. Where a concept does not act at any time (acting.py), the
prompt's versions go the same way, side by side (1, n, versions · d), so that the host lengthens them as it does the
prompt.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.conds import CONDConstant, CONDCrossAttn, CONDRegular
from comfy.sd1_clip import SDTokenizer
from torch import Tensor

from .acting import Acting, Words, versions
from .apart import members
from .gate_reading import similarities, word_rows

# Names in the conditioning, and the wrapper's keyword arguments.
WORDS, PRESENT, VERSIONS, TEXTS = "perfusion_words", "perfusion_gate", "perfusion_versions", "perfusion_texts"
PLACES = "perfusion_places"  # (1, n, j): where in the prompt the words stand, for those that are kept apart
SAID = "perfusion_said"  # in the conditioning: its rows of words, and {concept's word: (what its gate sees, weight)}


@dataclass(frozen=True)
class Token:
    """What stands for a word: per text encoder a vector (d), or none if the concept is off, and the superclass id.

    `heard` is told of every prompt what the gate along `direction` sees of it (`similarities`), and the word's weight
    in it, 0 where the prompt does not say the word.
    """

    vector: dict[str, Tensor]
    superclass: dict[str, int]
    direction: Tensor | None = None  # (d)
    heard: Callable[[list, float], None] | None = None
    acting: Acting = Acting()


class WordTokenizer:
    """The tokenizer of one text encoder; `ids` says what a word becomes: a vector (d) or a token id."""

    def __init__(self, base, ids: dict[str, Tensor | int], start: int, has_end: bool):
        self.base, self.ids, self.start, self.end = base, ids, start, -1 if has_end else None
        self.pattern = re.compile("(" + "|".join(map(re.escape, ids)) + ")")

    def __getattr__(self, name):
        if name == "base":  # not there yet while `copy` builds an empty one
            raise AttributeError(name)
        return getattr(self.base, name)

    def __call__(self, text, *args, **kwargs):
        parts = self.pattern.split(text)
        if len(parts) == 1:
            return self.base(text, *args, **kwargs)
        empty = self.base("", *args, **kwargs)["input_ids"]
        found = list(empty[: self.start])
        for part in parts:
            if part in self.ids:
                found.append(self.ids[part])
            elif part.strip():
                found += self.base(part, *args, **kwargs)["input_ids"][self.start : self.end]
        return {"input_ids": found + ([] if self.end is None else list(empty[-1:]))}


class WordEncoder:
    """`encode_token_weights` of a CLIP model, which also tells the concepts that the prompt names.

    The pooled answer, which SDXL adds to the time embedding past every key and value, is that of the prompt with the
    superclass word: there the learnt vector would act outside the gate.
    """

    def __init__(self, plain, words: dict[str, Token], tokenizers: dict[str, SDTokenizer]):
        self.plain, self.words, self.tokenizers = plain, words, tokenizers
        self.marked = tuple(word for word, token in words.items() if token.vector)
        acting = {word: words[word].acting for word in self.marked}
        self.versions, self.apart = versions(acting), members(acting, Words(acting))

    def __call__(self, tokens):
        cond, pooled, *extra = self.plain(tokens)
        if not self.marked:
            return cond, pooled, *extra
        weights = self._weights(tokens)
        said = Words(weights)
        answers = {Words(): (cond, pooled)}  # by which of the said words are given back to their superclass
        for words in {said, *(version & said for version in self.versions)} - {Words()}:
            answers[words] = self.plain(self._given_back(tokens, words))
        present = torch.tensor([[weights.get(word, 0.0) for word in self.marked]])
        conds = {WORDS: CONDConstant(self.marked), PRESENT: CONDRegular(present)}
        if len(self.versions) > 1:
            texts = torch.cat([answers[version & said][0] for version in self.versions], -1)
            conds |= {VERSIONS: CONDConstant(self.versions), TEXTS: CONDCrossAttn(texts)}
        if self.apart:
            conds[PLACES] = CONDCrossAttn(self._places(tokens))
        return cond, answers[said][1], {**(extra[0] if extra else {}), "model_conds": conds,
                                            SAID: self._said(tokens, cond, weights)}

    def _said(self, tokens, cond, weights):
        key, chunks = next(iter(tokens.items()))  # SDXL's two encoders have the same words in the same rows
        name = f"clip_{key}"
        vectors = {word: token.vector[name] for word, token in self.words.items() if token.vector}
        said = {}
        for word, token in self.words.items():
            if token.vector and token.direction is not None and (token.heard or word in weights):
                seen = similarities(chunks, cond[0], token.direction, vectors, self.tokenizers[name])
                if token.heard:
                    token.heard(seen, weights.get(word, 0.0))
                if word in weights:
                    said[word] = seen, weights[word]
        return word_rows(chunks, self.tokenizers[name]), said

    def _places(self, tokens) -> Tensor:
        key, chunks = next(iter(tokens.items()))
        said = [self._word(key, t) for chunk in chunks for t, _ in chunk]
        return torch.tensor([[[float(word == one) for one in self.marked] for word in said]])

    def _word(self, key, t):
        return next((word for word in self.marked if t is self.words[word].vector.get(f"clip_{key}")), None)

    def _weights(self, tokens) -> dict[str, float]:
        weights = {}
        for key, chunks in tokens.items():
            for t, weight in (pair for chunk in chunks for pair in chunk):
                if word := self._word(key, t):
                    weights[word] = max(weight, weights.get(word, weight))
        return weights

    def _given_back(self, tokens, words: Words) -> dict:
        def token(key, t):
            word = self._word(key, t)
            return self.words[word].superclass[f"clip_{key}"] if word in words else t

        return {key: [[(token(key, t), weight) for t, weight in chunk] for chunk in chunks]
                for key, chunks in tokens.items()}


def tokenizers(clip) -> dict[str, SDTokenizer]:
    """The CLIP's tokenizers by encoder name: clip_l, clip_g, clip_h."""
    return {t.embedding_key: t for t in vars(clip.tokenizer).values() if isinstance(t, SDTokenizer)}


def encoder(clip, name: str):
    """The text encoder of that name inside the CLIP's model."""
    return getattr(clip.cond_stage_model, name)


def superclass_ids(clip, superclass: str) -> dict[str, int]:
    """The superclass word's token id per text encoder. Raises ValueError where it is not one word of one token."""
    word = superclass.strip()
    if not word or len(word.split()) > 1:
        raise ValueError(
            f"The superclass is one plain word for the kind of thing, such as cat, person or toy; got '{superclass}'."
        )
    found = {}
    for name, tokenizer in tokenizers(clip).items():
        ids = tokenizer.tokenizer(word)["input_ids"][tokenizer.tokens_start : -1]
        if len(ids) != 1 or ids[0] == tokenizer.tokenizer.unk_token_id:  # of the demo's few words
            raise ValueError(
                f"The text encoder takes '{word}' in {len(ids)} pieces or does not know it, and the superclass has to "
                "be one that it knows. Use a more common word for the same kind, such as animal, person or toy."
            )
        found[name] = ids[0]
    return found


def embedding(clip, word: str) -> dict[str, Tensor]:
    """The superclass word's row (d), in fp32 on the CPU, of each text encoder's table."""
    clip.load_model()
    ids = superclass_ids(clip, word)
    tables = {name: encoder(clip, name).transformer.get_input_embeddings() for name in ids}
    return {name: tables[name].weight[i].detach().float().cpu().clone() for name, i in ids.items()}


def words_of(clip) -> dict[str, Token]:
    """The words that this CLIP has been taught, oldest first."""
    encode = clip.cond_stage_model.encode_token_weights
    return encode.words if isinstance(encode, WordEncoder) else {}


def with_word(clip, word: str, token: Token):
    """A clone of CLIP that knows one word more. The CLIP that came in is left as it was."""
    if word in words_of(clip):
        raise ValueError(
            f"Two of the applied concepts are called {word}, so a prompt could not say which is meant. "
            "Tune one of them with another word, or apply only one."
        )
    words = {**words_of(clip), word: token}
    clip = clip.clone()
    clip.tokenizer = copy.copy(clip.tokenizer)
    for attribute, tokenizer in list(vars(clip.tokenizer).items()):
        if isinstance(tokenizer, SDTokenizer):
            name, tokenizer = tokenizer.embedding_key, copy.copy(tokenizer)
            base = tokenizer.tokenizer
            base = base.base if isinstance(base, WordTokenizer) else base
            ids = {w: t.vector.get(name, t.superclass[name]) for w, t in words.items()}
            tokenizer.tokenizer = WordTokenizer(base, ids, tokenizer.tokens_start, tokenizer.tokenizer_adds_end_token)
            setattr(clip.tokenizer, attribute, tokenizer)
    encode = clip.cond_stage_model.encode_token_weights
    clip.cond_stage_model = copy.copy(clip.cond_stage_model)
    clip.cond_stage_model.encode_token_weights = WordEncoder(getattr(encode, "plain", encode), words,
                                                              tokenizers(clip))
    return clip
