"""The covariance of a text encoder: which tokens it is of, how it is inverted, and the file in which it is kept."""

import logging
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from perfusion.bench import captions as bench
from perfusion.core import covariance
from perfusion.core.covariance import BATCH, PACKAGED, inverse_of
from perfusion.core.key_lock import second_moment

WIDTH = 6
LINES = [f"caption {k}" for k in range(100)]
CAPTIONS = {"a red fox": 5, "cat": 3, "a photo of a dog.": 8, "a cat (on a mat)": 9, "the (very:1.5) old": 11,
            "dog " * 90: 77}  # start to first end token


class Encoder:
    """Encodes a caption to random tokens of its own, and counts the captions."""

    def __init__(self, tokens=7, rank=WIDTH):
        self.tokens, self.rank, self.seen = tokens, rank, []

    def __call__(self, lines):
        self.seen += lines
        return [self.row(line) for line in lines]

    def row(self, line):
        x = torch.randn(self.tokens, WIDTH, generator=torch.Generator().manual_seed(len(line) + sum(map(ord, line))))
        return x * (torch.arange(WIDTH) < self.rank)


def silent(done, total):
    pass


def files(folder):
    return [path for path in (folder / "covariance").rglob("*") if path.is_file()]


def test_second_moment_is_the_mean_of_outer_products():
    rows = [Encoder(n).row(line) for n, line in zip((3, 9, 1, 40), LINES)]
    C, tokens = second_moment(iter(rows))
    x = np.concatenate([row.numpy().astype(np.float64) for row in rows])
    assert tokens == len(x) == 53
    np.testing.assert_allclose(C.numpy(), np.einsum("ni,nj->ij", x, x) / len(x), rtol=1e-12, atol=1e-14)


def test_the_inverse_undoes_the_covariance(tmp_path):
    encode = Encoder()
    inverse, key, facts = inverse_of(encode, "encoder", LINES, tmp_path, silent)
    C, _ = second_moment(map(encode.row, LINES))
    torch.testing.assert_close(inverse @ C, torch.eye(WIDTH, dtype=torch.float64), atol=1e-5, rtol=0)
    assert inverse.dtype == torch.float64 and torch.equal(inverse, inverse.T)
    assert facts == {"captions": 100, "tokens": 700, "ridge": 0.0} and len(key) == 32


def test_it_is_computed_once(tmp_path):
    encode = Encoder()
    first = inverse_of(encode, "encoder", LINES, tmp_path, silent)
    assert encode.seen == LINES and len(files(tmp_path)) == 1
    again = inverse_of(encode, "encoder", LINES, tmp_path, silent)
    assert encode.seen == LINES and torch.equal(again[0], first[0]) and again[1:] == first[1:]


def test_another_encoder_or_another_caption_is_another_covariance(tmp_path):
    keys = [inverse_of(Encoder(), name, lines, tmp_path, silent)[1]
            for name in ("encoder", "other") for lines in (LINES, LINES[:-1], LINES[::-1])]
    assert len(set(keys)) == 6 == len(files(tmp_path))


def test_few_tokens_get_a_ridge_and_a_warning(tmp_path, caplog):
    encode, lines = Encoder(tokens=2), LINES[:4]
    with caplog.at_level(logging.WARNING):
        inverse, _, facts = inverse_of(encode, "encoder", lines, tmp_path, silent)
    assert facts["ridge"] == covariance.RIDGE and "4 captions (8 tokens) are few for a text width of 6" in caplog.text
    C, _ = second_moment(map(encode.row, lines))
    ridge = covariance.RIDGE * C.trace() / WIDTH * torch.eye(WIDTH)
    torch.testing.assert_close(inverse @ (C + ridge), torch.eye(WIDTH, dtype=torch.float64), atol=1e-4, rtol=0)


def test_tokens_that_just_suffice_get_none(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        enough = inverse_of(Encoder(tokens=6), "encoder", LINES[:10], tmp_path, silent)[2]
        too_few = inverse_of(Encoder(tokens=6), "encoder", LINES[:9], tmp_path, silent)[2]
    assert (enough["ridge"], too_few["ridge"]) == (0, covariance.RIDGE) and caplog.text.count("are few") == 1


def test_captions_that_do_not_span_the_space_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="do not span.*Use more, and more varied, captions"):
        inverse_of(Encoder(rank=4), "encoder", LINES, tmp_path, silent)


def test_progress_goes_from_none_to_all(tmp_path):
    heard = []
    inverse_of(Encoder(), "encoder", LINES, tmp_path, lambda done, total: heard.append((done, total)))
    assert heard == [(done, 100) for done in (*range(0, 100, BATCH), 100)]


def test_an_interrupted_computation_leaves_no_file(tmp_path):
    def progress(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inverse_of(Encoder(), "encoder", LINES, tmp_path, progress)
    assert not files(tmp_path)


# Captions


def test_the_packaged_captions_are_many_and_distinct(tmp_path):
    lines = covariance.captions(tmp_path)
    assert len(lines) >= 4000 and len({line.lower() for line in lines}) == len(lines)


def test_the_bench_draws_the_packaged_captions(tmp_path):
    assert "\n".join(bench.captions()) + "\n" == PACKAGED.read_bytes().decode("utf-8")
    assert bench.OUTPUT == PACKAGED


def test_captions_of_the_users_own_take_the_place_of_the_packaged(tmp_path):
    (tmp_path / "captions.txt").write_text("  a red fox \r\n\n café\n", encoding="utf-8", newline="")
    assert covariance.captions(tmp_path) == ["a red fox", "café"]


@pytest.mark.parametrize("text", ("", "\n \n\t\n"))
def test_an_empty_caption_file_is_refused_with_a_sentence(tmp_path, text):
    (tmp_path / "captions.txt").write_text(text)
    with pytest.raises(ValueError, match="captions.txt is empty. Put one caption on each line"):
        covariance.captions(tmp_path)


# Against the real host


@pytest.fixture
def host(request, tmp_path):
    pytest.importorskip("comfy")  # the tests above need no host
    from perfusion.core.host_comfy import ComfyHost

    tiny = request.getfixturevalue("tiny")

    def over(kind, lines, change=lambda clip: clip, **more):
        (tmp_path / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
        model, clip, vae = tiny(kind)
        return ComfyHost(model, change(clip), vae, "cat", tmp_path, **more)

    with torch.inference_mode():
        yield over


@pytest.mark.parametrize("kind", ("sd1", "sd2", "sdxl"))
def test_tokens_from_the_start_to_the_first_end_token_count(host, kind, tmp_path):
    host = host(kind, CAPTIONS)
    _, _, facts = host.inverse_covariance()
    assert facts["captions"] == len(CAPTIONS) and facts["tokens"] == sum(CAPTIONS.values())
    rows = []
    for line, tokens in CAPTIONS.items():  # each by itself, and brackets are no weights
        x = host.clip.encode_from_tokens(host.clip.tokenize(line, disable_weights=True))
        rows.append(x[0, :tokens])
    C = safetensors.torch.load_file(files(tmp_path)[0])["covariance"]
    torch.testing.assert_close(C, second_moment(rows)[0].float(), rtol=1e-4, atol=1e-5)


def test_the_users_captions_give_another_hash_and_the_same_ones_the_same(host):
    keys = [host("sd1", lines).inverse_covariance()[1] for lines in (LINES, LINES[1:], LINES)]
    assert keys[0] == keys[2] != keys[1]


def test_the_hash_is_that_of_the_weights_that_are_read(host):
    def unread(clip):
        clip.cond_stage_model.clip_l.transformer.text_projection.weight.fill_(float("nan"))
        return clip

    def read(clip):
        clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp.fc1.weight.mul_(1.01)
        return clip

    def skip(clip):
        clip.clip_layer(-2)
        return clip

    lines = LINES[:3]
    keys = {change: host("sd1", lines, change).inverse_covariance()[1] for change in (unread, read, skip)}
    plain = host("sd1", lines)
    before, after = (plain.inverse_covariance()[1] for _ in range(2))  # the second time the encoder is loaded
    assert keys[unread] == before == after and len({before, *keys.values()}) == 3


@pytest.mark.parametrize("way", ("progress", "cancel"))
def test_a_cancel_while_it_is_computed_leaves_no_file(host, tmp_path, way):
    import comfy.model_management as memory

    def progress(done, total):
        if done and way == "progress":
            raise memory.InterruptProcessingException
        if done:
            memory.interrupt_current_processing(True)

    with pytest.raises(memory.InterruptProcessingException):
        host("sd1", LINES, progress=progress).inverse_covariance()
    assert not files(tmp_path) and not memory.processing_interrupted()


def test_no_packaged_caption_is_longer_than_a_prompt(host, tmp_path):
    from perfusion.core.prompt import tokenizers

    tokenizer = tokenizers(host("sd1", LINES).clip)["clip_l"].tokenizer
    lengths = [len(tokenizer(line)["input_ids"]) - 2 for line in PACKAGED.read_text(encoding="utf-8").splitlines()]
    assert 0 < min(lengths) and max(lengths) <= 75


def test_frames_name_the_superclass_first_then_other_plain_things_once():
    lines = ["a dog on a chair", "A Teapot in the snow", "the teapot and a teapot", "teapots", "a (teapot:1.2)",
             "a bird at night", "nothing at all", "a teapot " * 40, "the dog and the dog", "an old teapot, and a cat"]
    assert covariance.frames(lines, "teapot") == [
        "A {} in the snow", "an old {}, and a cat", "a {} on a chair", "a {} at night"]
    assert covariance.frames(["a c.t", "a cat"], "c.t") == ["a {}", "a {}"]
    assert len(covariance.frames(["a dog"] * 100, "teapot")) == covariance.FRAMES


def test_the_packaged_captions_have_frames_for_any_superclass():
    lines = covariance.captions(Path("nowhere"))
    for superclass in "cat", "person", "wibble":
        found = covariance.frames(lines, superclass)
        assert len(set(found)) == covariance.FRAMES and all(frame.count("{}") == 1 for frame in found)
