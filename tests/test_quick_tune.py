"""Quick Tune as the node calls it: pictures before and after, what is found again on disk, what is refused early."""

import pytest
import torch

from perfusion.core import apply as applying
from perfusion.core import quick_tune as quick
from perfusion.core.concept import dump
from perfusion.core.covariance import PACKAGED
from perfusion.core.tune import Tuning

from tuning import patched

pytestmark = pytest.mark.host

PICTURE = torch.rand(1, 64, 80, 3, generator=torch.Generator().manual_seed(7))
FAST = Tuning(steps=2, batch=1, resolution=64)


class Watch:
    """Counts what it hears."""

    def __init__(self):
        self.captioned, self.pictures, self.steps, self.concepts, self.notes = 0, 0, 0, [], []

    def captions(self, done, total):
        self.captioned += 1

    def picture(self, made):
        self.pictures += 1
        self.last = made

    def note(self, text):
        self.notes.append(text)

    def step(self, progress):
        self.steps += 1
        self.concepts.append(progress.concept)


@pytest.fixture
def folder(tmp_path):
    lines = PACKAGED.read_text(encoding="utf-8").splitlines()
    (tmp_path / "captions.txt").write_text("\n".join(lines[::32]), encoding="utf-8")
    return tmp_path


def quick_tune(model, clip, vae, folder, word="<mimi>", settings=FAST, start=None, every=0):
    watch = Watch()
    with torch.inference_mode():
        made = quick.quick_tune(model, clip, vae, PICTURE, "cat", word, settings, None, start, folder, watch,
                                     lambda concept: "a file", every)
    return *made, watch


def test_a_requeue_gives_the_same_concept_and_pictures_without_a_step(tiny, folder):
    first, before, after, watched = quick_tune(*tiny("sd1"), folder)
    assert watched.steps == 2 and watched.pictures == 1 and watched.captioned
    assert before.shape == after.shape == (1, 64, 64, 3) and not torch.equal(before, after)
    again, before_again, after_again, watched = quick_tune(*tiny("sd1"), folder)  # loaded anew, as after a restart
    assert watched.steps == watched.pictures == watched.captioned == 0
    assert dump(again) == dump(first)
    for now, then in ((before_again, before), (after_again, after)):
        assert (now - then.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("lora", (False, True))
@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
def test_pictures_between_steps_show_what_is_learnt_by_then_and_change_nothing(tiny, folder, kind, lora):
    settings = Tuning(steps=3, batch=1, resolution=64)

    def loaded():
        model, clip, vae = tiny(kind)
        return (*(patched(model, clip) if lora else (model, clip)), vae)

    plain, _, after, _ = quick_tune(*loaded(), folder, settings=settings)
    for path in (folder / "cache").iterdir():
        path.unlink()
    watched, _, after_again, watch = quick_tune(*loaded(), folder, settings=settings, every=2)
    assert dump(watched) == dump(plain) and torch.equal(after_again, after)
    assert watch.pictures == 2 and watch.steps == 3
    with torch.inference_mode():
        model, clip, vae = loaded()
        drawn = quick.picture(*applying.apply(model, clip, watch.concepts[1]), vae, "a photo of a <mimi>", (8, 8), 0)
    assert torch.equal(watch.last, drawn) and not torch.equal(drawn, after)


def test_other_settings_are_learnt_anew(tiny, folder):
    from dataclasses import replace

    loaded = tiny("sd1")
    quick_tune(*loaded, folder)
    assert quick_tune(*loaded, folder, settings=replace(FAST, seed=1))[3].steps == 2
    assert quick_tune(*loaded, folder, word="<tom>")[3].steps == 2


def test_pictures_lost_from_the_cache_are_made_again_and_nothing_is_learnt(tiny, folder):
    first = quick_tune(*tiny("sd1"), folder)[0]
    for path in (folder / "cache").glob("*.pictures"):
        path.unlink()
    again, _, _, watched = quick_tune(*tiny("sd1"), folder)
    assert watched.steps == 0 and watched.pictures == 1 and dump(again) == dump(first)


def test_a_model_that_carries_a_concept_learns_another_as_the_plain_model_does(tiny, folder):
    model, clip, vae = tiny("sd1")
    first = quick_tune(model, clip, vae, folder)[0]
    plain = quick_tune(model, clip, vae, folder, word="<tom>")
    for path in (folder / "cache").iterdir():
        path.unlink()
    carrying, knowing = applying.apply(model, clip, first)
    again = quick_tune(carrying, knowing, vae, folder, word="<tom>")
    assert again[3].steps == 2
    assert dump(again[0]) == dump(plain[0]) and torch.equal(again[2], plain[2])


def test_going_on_with_the_same_word_asks_for_the_plain_clip(tiny, folder):
    model, clip, vae = tiny("sd1")
    first = quick_tune(model, clip, vae, folder)[0]
    with pytest.raises(ValueError, match="called <mimi>"):
        quick_tune(*applying.apply(model, clip, first), vae, folder, start=first, settings=Tuning(3, 1, resolution=64))


@pytest.mark.parametrize("word, superclass, says", [
    ("cat", "cat", "angle brackets"), ("<mimi>", "big cat", "one plain"),
])
def test_words_are_refused_before_anything_is_drawn(tiny, folder, word, superclass, says):
    watch = Watch()
    with torch.inference_mode(), pytest.raises(ValueError, match=says):
        quick.quick_tune(*tiny("sd1"), PICTURE, superclass, word, FAST, None, None, folder, watch, None)
    assert watch.pictures == watch.captioned == 0


class Cancel(BaseException):
    """As the host's own."""


def test_a_cancel_in_the_last_picture_keeps_what_was_learnt(tiny, folder, monkeypatch):
    made, kept = [], []
    plain = quick.picture

    def picture(*args):
        made.append(args)
        if len(made) == 2:
            raise Cancel
        return plain(*args)

    monkeypatch.setattr(quick, "picture", picture)
    with torch.inference_mode(), pytest.raises(Cancel):
        quick.quick_tune(*tiny("sd1"), PICTURE, "cat", "<mimi>", FAST, None, None, folder, Watch(), kept.append)
    assert len(kept) == 1 and kept[0].training["steps"] == 2
    monkeypatch.undo()
    again, _, _, watched = quick_tune(*tiny("sd1"), folder)
    assert watched.steps == 0 and dump(again) == dump(kept[0])


def test_a_cache_that_cannot_be_written_loses_no_work(tiny, folder, caplog):
    (folder / "cache").write_text("a file, where a folder cannot be made")
    concept, _, after, watched = quick_tune(*tiny("sd1"), folder)
    assert watched.steps == 2 and concept.word == "<mimi>" and after.isfinite().all()
    assert "not kept for a re-queue" in caplog.text


@pytest.mark.parametrize("suffix", ["safetensors", "pictures"])
def test_a_damaged_cache_is_learnt_over(tiny, folder, suffix):
    first = quick_tune(*tiny("sd1"), folder)[0]
    (path,) = (folder / "cache").glob(f"*.{suffix}")
    path.write_bytes(path.read_bytes()[:50])
    for file in (folder / "covariance").iterdir():
        file.write_bytes(b"damaged")
    again = quick_tune(*tiny("sd1"), folder)
    assert dump(again[0]) == dump(first) and again[2].isfinite().all()
    assert quick_tune(*tiny("sd1"), folder)[3].steps == 0
