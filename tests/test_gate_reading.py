"""What is told of a prompt is what the gate has when the model is called: word for word, and whose weight is none."""

import pytest
import torch

import applied

pytestmark = pytest.mark.host
inference, world = applied.inference, applied.world  # fixtures

PROMPT = "a photo of <mimi>, sitting unbelievably in the snow"


def told(apply, w, prompt, *others):
    """What the first concept's `heard` is told of a prompt, and the prompt's encoding (n, d)."""
    answers = []
    _, clip = apply(w.model, w.clip, w.cat, heard=lambda words, weight: answers.append((words, weight)))
    for other in others:
        _, clip = apply(w.model, clip, other)
    x = clip.encode_from_tokens(clip.tokenize(prompt))[0]
    (words, weight), = answers
    return words, weight, x


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_prompts_words_come_in_its_order_and_are_as_open_as_the_gate_of_the_edit(world, kind):
    from perfusion.core.apply import apply
    from perfusion.core.joint_edit import JointEdit
    from perfusion.core.key_lock import gate

    w = world(kind)
    words, weight, x = told(apply, w, PROMPT, w.dog)
    assert "".join(word for word, _ in words) == PROMPT.replace(" ", "") and weight == 1
    assert words[-1][0] == "" and "<mimi>" in [word for word, _ in words]
    _, _, g = JointEdit((w.cat,))(torch.ones(1, 1))(x)
    opened = w.cat.scale * gate(torch.tensor([s for _, s in words]), w.cat.gate_bias, w.cat.temperature)
    first = 1 + words.index(next(pair for pair in words if pair[0] == "<mimi>"))  # after the start, one row a word
    torch.testing.assert_close(opened[: first], g[0, 1 : first + 1, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(opened.max(), g[0, 1:, 0].max(), rtol=1e-4, atol=1e-5)


def test_a_prompt_without_the_word_is_told_with_no_weight_and_a_weighed_word_with_its_own(world):
    from perfusion.core.apply import apply

    w = world("sd1")
    assert told(apply, w, "blurry")[1] == 0
    assert told(apply, w, "a (<mimi>:1.3) in the snow")[1] == pytest.approx(1.3)


def test_a_prompt_of_several_chunks_is_read_to_its_end(world):
    from perfusion.core.apply import apply

    words, _, _ = told(apply, world("sd1"), "snow " * 90 + "and <mimi> at night")
    assert [word for word, _ in words] == ["snow"] * 90 + ["and", "<mimi>", "at", "night", ""]


def test_listening_changes_no_bit_of_what_is_encoded(world):
    from perfusion.core.apply import apply

    w = world("sd1")
    _, _, x = told(apply, w, PROMPT)
    _, clip = apply(w.model, w.clip, w.cat)
    assert clip.encode_from_tokens(clip.tokenize(PROMPT))[0].equal(x)


def test_a_concept_that_is_off_has_nothing_to_tell(world):
    from perfusion.core.apply import apply

    w, answers = world("sd1"), []
    _, clip = apply(w.model, w.clip, w.cat.at(0), heard=lambda *told: answers.append(told))
    clip.encode_from_tokens(clip.tokenize(PROMPT))
    assert answers == []
