"""Quick Tune in ComfyUI, from pictures to a concept and back to a picture: learnt once, and found again on disk."""

import logging
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from . import tune as tuning
from .apply import apply, check, plain
from .concept import check_word, dump, load, parse, save
from .covariance import captions
from .file import write
from .host_comfy import ComfyHost, picture, tune_key
from .once_more import FACT, once_more
from .prompt import Token, with_word


def quick_tune(model, clip, vae, images, superclass, word, settings, mask, start, folder, watch, keep, every=0):
    """Learn a concept (see `tune.tune`), or find it on disk where the same was learnt before.

    `folder` keeps covariances and finished tunes. `watch` hears through captions(done, total), picture(made) of the one
    from before and of one after each `every` steps (0: of none), step(progress), and note(text) of the memory that it
    takes. Returns the concept and pictures (1, H, W, 3) before and after, of one prompt and seed. Concepts that the
    model carries already take no part. Raises ValueError for bad input, tune.Diverged, and the host's cancel; what was
    learnt by then went to `keep`.
    """
    model = plain(model)
    tuning.check(images, mask, settings)
    check_word(word)
    if start:
        check(model, clip, start)
    host = ComfyHost(model, clip, vae, superclass, folder, watch.captions, watch.note)
    with_word(clip, word, Token({}, host.ids))  # refuses a word that is taken, before any work
    key = tune_key(model, clip, vae, images, mask, superclass, word, asdict(settings), start and dump(start),
                   captions(host.folder))
    cache = Cache(Path(folder) / "cache", key)
    concept, pictures = cache.read()
    if not pictures:
        prompt = settings.templates[0]
        size = tuple(side // 8 for side in tuning.fit(images[:1], settings.resolution).shape[1:3])
        before = picture(model, clip, vae, prompt.replace("{}", superclass.strip()), size, settings.seed)
        watch.picture(before)

        def drawn(concept):
            return picture(*apply(model, clip, concept), vae, prompt.replace("{}", word), size, settings.seed)

        def step(progress):
            if every and progress.step % every == 0 and progress.step < progress.steps:
                with host.paused():
                    watch.picture(drawn(progress.concept))
            watch.step(progress)

        def learn(settings, tight):
            return tuning.tune(host, images, superclass, word, settings, mask, start, step, keep, tight)

        if not concept:
            concept = once_more(host, learn, settings, watch.note)
            concept = parse(dump(concept), word)  # what a re-queue will find, to the last bit
            cache.write(concept)
        del host  # and with it, on a card, what was loaded to learn
        try:
            after = drawn(concept)
        except BaseException:
            keep(concept)
            raise
        pictures = before, after
        cache.write(concept, pictures)
    return concept, *pictures


class Cache:
    """A finished tune on disk, and its two pictures. What is damaged is as good as absent, and a full disk loses no
    work."""

    def __init__(self, folder: Path, key: str | None):
        self.key, self.concept, self.pictures = key, folder / f"{key}.safetensors", folder / f"{key}.pictures"

    def read(self) -> tuple:
        """The concept or None, and pictures (before, after) in 0..1 or None."""
        concept = pictures = None
        try:
            concept = load(self.concept)
            stored = safetensors.torch.load_file(self.pictures)
            pictures = stored["before"] / 255, stored["after"] / 255
        except (OSError, ValueError, SafetensorError):
            pass
        return concept, pictures

    def write(self, concept, pictures=None):
        if not self.key or FACT in concept.training:  # another time there may be more memory
            return
        try:
            save(concept, self.concept)
            if pictures:
                before, after = ((p.clamp(0, 1) * 255).round().byte().contiguous() for p in pictures)
                write(self.pictures, safetensors.torch.save({"before": before, "after": after}))
        except OSError as error:
            logging.warning(f"Perfusion: the tune is not kept for a re-queue. {error.strerror}")
