"""The concept's word in ComfyUI's CLIP: what a prompt with it becomes, and that nothing else changes."""

import pytest
import torch

from perfusion.core.prompt import PRESENT, WORDS, Token, encoder, superclass_ids, with_word, words_of

pytestmark = pytest.mark.host
KINDS = ("sd1", "sd2", "sdxl")
PLAIN = (
    "",
    "a photo of a cat",
    " ".join(f"word{i}" for i in range(200)),
    "((a cat)), (red:1.3) [and] (blue:0.5) \\(sky\\)",
    "a photo, embedding:foo and embedding:bar, red",
    "<lora:cat:0.8> <mimi2> < mimi > <Mimi> mimi <>",
)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def clips(tiny):
    loaded = {}

    def clip(kind):
        if kind not in loaded:
            loaded[kind] = tiny(kind)[1]
        return loaded[kind]

    return clip


def token(clip, superclass="cat", seed=0) -> Token:
    """A random vector near the superclass word's, per text encoder."""
    generator, ids = torch.Generator().manual_seed(seed), superclass_ids(clip, superclass)
    vector = {}
    for name, i in ids.items():
        v = encoder(clip, name).transformer.get_input_embeddings().weight[i].float()
        vector[name] = v + v.std() * torch.randn(v.shape, generator=generator)
    return Token(vector, ids)


def taught(clip, *words, superclass="cat"):
    for seed, word in enumerate(words or ("<mimi>",)):
        clip = with_word(clip, word, token(clip, superclass, seed))
    return clip


def encode(clip, prompt):
    """(cond, pooled, marks) of a prompt: marks map the words to their weights, None where there is no mark."""
    return answer(clip.encode_from_tokens_scheduled(clip.tokenize(prompt)))


def answer(conditioning):
    (cond, rest), = conditioning
    if "model_conds" not in rest:
        return cond, rest["pooled_output"], None
    marks = rest["model_conds"]
    assert marks[PRESENT].cond.shape == (1, len(marks[WORDS].cond))
    return cond, rest["pooled_output"], dict(zip(marks[WORDS].cond, marks[PRESENT].cond[0].tolist(), strict=True))


def by_hand(clip, prompt, word, known):
    """Tokens of a prompt in which the superclass word stands, with the concept's vector in its place."""
    tokens = clip.tokenize(prompt)
    name, v = f"clip_{next(iter(tokens))}", known[word]
    assert any(t == v.superclass[name] for chunk in tokens[name[5:]] for t, _ in chunk)
    return {
        key: [[(v.vector[f"clip_{key}"] if t == v.superclass[f"clip_{key}"] else t, weight) for t, weight in chunk]
              for chunk in chunks]
        for key, chunks in tokens.items()
    }


def same_tokens(a, b):
    """Whether two tokenised prompts hold the same ids, vectors and weights in the same places."""
    def same(s, t):
        return s[1] == t[1] and (s[0] is t[0] if torch.is_tensor(s[0]) or torch.is_tensor(t[0]) else s[0] == t[0])

    return a.keys() == b.keys() and all(
        len(a[key]) == len(b[key]) and all(
            len(c) == len(d) and all(map(same, c, d)) for c, d in zip(a[key], b[key], strict=True)
        ) for key in a
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PLAIN, ids=range(len(PLAIN)))
def test_a_prompt_without_the_word_is_encoded_bit_for_bit_as_before(clips, kind, prompt):
    clip = clips(kind)
    cond, pooled, marks = encode(taught(clip), prompt)
    cond_plain, pooled_plain, unmarked = encode(clip, prompt)
    assert torch.equal(cond, cond_plain) and torch.equal(pooled, pooled_plain)
    assert marks == {"<mimi>": 0.0} and unmarked is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_clip_that_came_in_is_untouched(clips, kind):
    clip = clips(kind)
    before = [dict(vars(thing)) for thing in (clip, clip.tokenizer, clip.cond_stage_model)]
    bases = [(t, t.tokenizer) for t in vars(clip.tokenizer).values() if hasattr(t, "tokenizer")]
    cond = encode(clip, "a photo of <mimi>")[0]
    encode(taught(clip), "a photo of (<mimi>:1.2)")
    assert [dict(vars(thing)) for thing in (clip, clip.tokenizer, clip.cond_stage_model)] == before
    assert bases and all(t.tokenizer is base for t, base in bases)
    assert words_of(clip) == {}
    again, _, marks = encode(clip, "a photo of <mimi>")
    assert torch.equal(again, cond) and marks is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_words_row_is_the_concepts_vector(clips, kind):
    clip = clips(kind)
    knows = taught(clip)
    tokens = by_hand(clip, "a photo of a cat, sitting", "<mimi>", words_of(knows))
    assert same_tokens(knows.tokenize("a photo of a <mimi>, sitting"), tokens)
    cond, _, marks = encode(knows, "a photo of a <mimi>, sitting")
    assert torch.equal(cond, clip.encode_from_tokens(tokens))
    assert not torch.equal(cond, encode(clip, "a photo of a cat, sitting")[0])
    assert marks == {"<mimi>": 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_several_words_stand_side_by_side(clips, kind):
    clip = clips(kind)
    knows = with_word(taught(clip, "<mimi>", "<mimi-2>"), "<mi>", token(clip, "dog", 5))
    known = words_of(knows)
    assert list(known) == ["<mimi>", "<mimi-2>", "<mi>"]
    found = {}
    for key, chunks in knows.tokenize("<mimi-2><mi> and <mimi>, <mimi>").items():
        vectors = [t for t, _ in chunks[0] if torch.is_tensor(t)]
        found[key] = [next(w for w, known_token in known.items() if known_token.vector[f"clip_{key}"] is v)
                      for v in vectors]
    assert set(map(tuple, found.values())) == {("<mimi-2>", "<mi>", "<mimi>", "<mimi>")}
    assert encode(knows, "<mimi-2><mi> and red")[2] == {"<mimi>": 0.0, "<mimi-2>": 1.0, "<mi>": 1.0}
    alone = taught(clip, "<mimi>")
    assert torch.equal(encode(knows, "a <mimi>")[0], encode(alone, "a <mimi>")[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written, weight", [("(%s:1.2)", 1.2), ("((%s))", 1.1 * 1.1), ("(a %s, red:0.7)", 0.7),
                                             ("%s, (%s:1.5)", 1.5), ("(%s:1.5), %s", 1.5), ("(%s:0)", 0.0)])
def test_a_weight_in_the_prompt_weighs_the_word_and_its_mark(clips, kind, written, weight):
    clip = clips(kind)
    knows = taught(clip)
    prompt = written.replace("%s", "<mimi>")
    tokens = by_hand(clip, written.replace("%s", "cat"), "<mimi>", words_of(knows))
    assert same_tokens(knows.tokenize(prompt), tokens)
    cond, _, marks = encode(knows, prompt)
    assert torch.equal(cond, clip.encode_from_tokens(tokens))
    assert marks["<mimi>"] == pytest.approx(weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [70, 76, 90, 150])
def test_the_word_works_in_every_chunk_of_a_long_prompt(clips, kind, before):
    clip = clips(kind)
    knows, start = taught(clip), " ".join(["tree"] * before)
    prompt = f"{start} <mimi>, sitting in the grass"
    tokens = by_hand(clip, f"{start} cat, sitting in the grass", "<mimi>", words_of(knows))
    assert same_tokens(knows.tokenize(prompt), tokens)
    chunks = next(iter(tokens.values()))
    at = [any(torch.is_tensor(t) for t, _ in chunk) for chunk in chunks]
    assert len(chunks) > 1 or before < 75
    assert at.index(True) == before // 75
    cond, _, marks = encode(knows, prompt)
    assert cond.shape[1] == 77 * len(chunks)
    assert torch.equal(cond, clip.encode_from_tokens(tokens)) and marks == {"<mimi>": 1.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["%s, sitting", "%s's hat", "a %s.", "%s", "  %s  ", "(%s)", "%s-%s", "%s\nred",
                                    "\\(%s\\)", "red %s!", "%s: 2 hats", "“%s”", "an embedding:foo, %s"])
def test_what_stands_around_the_word_is_tokenised_as_usual(clips, kind, prompt):
    clip = clips(kind)
    knows = taught(clip)
    tokens = by_hand(clip, prompt.replace("%s", "cat"), "<mimi>", words_of(knows))
    assert same_tokens(knows.tokenize(prompt.replace("%s", "<mimi>")), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pooled_answer_is_that_of_the_superclass_word(clips, kind):
    clip = clips(kind)
    for prompt in ("a photo of %s, sitting", "a (%s:1.3)", "%s and a dog"):
        pooled = encode(taught(clip), prompt.replace("%s", "<mimi>"))[1]
        assert torch.equal(pooled, encode(clip, prompt.replace("%s", "cat"))[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_concept_that_is_off_is_its_superclass_word(clips, kind):
    clip = clips(kind)
    off = with_word(clip, "<mimi>", Token({}, superclass_ids(clip, "cat")))
    for prompt in ("a photo of %s, sitting", "a (%s:1.3)'s hat", " ".join(["tree"] * 90) + " %s."):
        cond, pooled, marks = encode(off, prompt.replace("%s", "<mimi>"))
        cond_plain, pooled_plain, _ = encode(clip, prompt.replace("%s", "cat"))
        assert torch.equal(cond, cond_plain) and torch.equal(pooled, pooled_plain) and marks is None
    one = with_word(off, "<toto>", token(clip, "dog"))
    cond, _, marks = encode(one, "<mimi> and <toto>")
    assert marks == {"<toto>": 1.0}
    assert torch.equal(cond, encode(taught(clip, "<toto>", superclass="dog"), "cat and <toto>")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_word_survives_what_other_nodes_do_to_the_clip(clips, kind):
    import nodes

    clip = clips(kind)
    knows, = nodes.CLIPSetLastLayer().set_last_layer(taught(clip).clone(), -2)
    plain, = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)
    tokens = by_hand(clip, "a photo of cat", "<mimi>", words_of(knows))
    cond, _, marks = encode(knows, "a photo of <mimi>")
    assert torch.equal(cond, plain.encode_from_tokens(tokens)) and marks == {"<mimi>": 1.0}
    assert torch.equal(encode(taught(plain), "a photo of <mimi>")[0], cond)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_text_encoder_is_used_whether_it_was_patched_before_or_after(clips, kind):
    clip = clips(kind)
    key = next(k for k in clip.get_key_patches() if k.endswith("layers.0.mlp.fc1.weight"))
    shape = clip.get_key_patches()[key][0][0].shape
    patch = {key: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1,))}
    after, before = taught(clip).clone(), clip.clone()
    after.add_patches(patch), before.add_patches(patch)
    cond = encode(after, "a photo of <mimi>")[0]
    assert torch.equal(cond, encode(taught(before), "a photo of <mimi>")[0])
    plain = encode(taught(clip), "a photo of <mimi>")[0]
    assert not torch.equal(cond, plain)
    assert torch.equal(encode(after, "a photo of <mimi>")[0], cond)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_encode_node_understands_the_word(clips, kind):
    import nodes

    clip = clips(kind)
    knows = taught(clip, "<mimi>", "<toto>")
    cond, pooled, marks = answer(nodes.CLIPTextEncode().encode(knows, "a photo of (<mimi>:1.2)")[0])
    expected = encode(knows, "a photo of (<mimi>:1.2)")
    assert torch.equal(cond, expected[0]) and torch.equal(pooled, expected[1])
    assert marks == pytest.approx({"<mimi>": 1.2, "<toto>": 0.0})


def test_the_stock_sdxl_encode_node_understands_the_word(clips):
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL

    clip = clips("sdxl")
    knows, sizes = taught(clip), (64, 64, 0, 0, 64, 64)
    for text_g, text_l in (("a <mimi>, red", "a <mimi>, red"), ("a <mimi>", ""), ("", "a <mimi>")):
        conditioning = CLIPTextEncodeSDXL.execute(knows, *sizes, text_g, text_l).result[0]
        cond, pooled, marks = answer(conditioning)
        plain = answer(CLIPTextEncodeSDXL.execute(clip, *sizes, text_g.replace("<mimi>", "cat"),
                                                  text_l.replace("<mimi>", "cat")).result[0])
        assert marks == {"<mimi>": 1.0} and conditioning[0][1]["width"] == 64
        assert torch.equal(pooled, plain[1]) and not torch.equal(cond, plain[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("superclass, said", [
    ("black cat", "one plain word.* got 'black cat'"),
    ("", "one plain word"),
    ("  ", "one plain word"),
    ("purrfectnesses", "takes 'purrfectnesses' in . pieces.* Use a more common word"),
    ("cat.", "'cat.' in 2 pieces"),
])
def test_a_superclass_that_is_not_one_token_gets_a_sentence(clips, kind, superclass, said):
    with pytest.raises(ValueError, match=said):
        superclass_ids(clips(kind), superclass)


def test_a_superclass_may_be_written_with_capitals_and_spaces_around(clips):
    assert superclass_ids(clips("sdxl"), " Cat ") == superclass_ids(clips("sdxl"), "cat")
    assert set(superclass_ids(clips("sdxl"), "cat")) == {"clip_l", "clip_g"}


def test_two_concepts_with_one_word_get_a_sentence(clips):
    knows = taught(clips("sd1"))
    with pytest.raises(ValueError, match="Two of the applied concepts are called <mimi>"):
        with_word(knows, "<mimi>", token(clips("sd1"), "dog", 1))
    assert list(words_of(knows)) == ["<mimi>"]
