"""The loop of a domain's training on a random miniature: what it shows, where it goes on, and how it stops."""

import pytest
import torch

from perfusion.bench import world
from perfusion.core import host_diffusers as hd
from perfusion.core.checkpoint import Checkpoint
from perfusion.core.school import Alone, Diverged, Schooling, train
from perfusion.core.train_domain import Course

CREATURE = "creature"


@pytest.fixture(scope="module")
def host(miniature, tmp_path_factory):
    lines = world.sample(40, torch.Generator().manual_seed(1))["captions"]
    folder = miniature(tmp_path_factory.mktemp("demo"), lines)
    return hd.DiffusersHost(hd.load(folder), CREATURE, folder)


class Scaled(Alone):
    """Scales the loss as for a UNet in fp16, and another way at each step."""

    def __init__(self, host):
        self.scaler = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=1)


def taught(host, settings, superclass=CREATURE, weight=1.0, **more):
    """(the course, all that was reported) of a training on six random pictures, each of which weighs this much."""
    r, heard = torch.Generator().manual_seed(1), []
    latents, seen = torch.randn(6, 8, 8, 8, generator=r), torch.randn(6, 2, 8, generator=r)

    def data(rows, turns):
        return latents[rows], torch.full((len(rows), 1, 8, 8), weight), seen[rows], ["a photo of a {}"] * len(rows)

    with host.training(latents[:1]):
        course = Course(host, superclass, seen, hidden=8)
        train(course, data, len(latents), settings, **{"report": heard.append} | more)
    return course, heard


def test_what_is_shown_is_the_mean_over_the_parts_of_a_step(host):
    whole, parts = (taught(host, Schooling(steps=2, batch=4, accumulate=n))[1] for n in (1, 4))
    for one, other in zip(whole, parts, strict=True):
        assert one.numbers == pytest.approx(other.numbers, rel=1e-3)


def stop(schooled):
    if schooled.step == 3:
        raise KeyboardInterrupt


def test_a_broken_training_with_a_scaled_loss_ends_as_an_unbroken_one(host, tmp_path):
    settings, machines = Schooling(steps=4, batch=2), [Scaled(host) for _ in range(3)]
    kept = {"checkpoint": Checkpoint(tmp_path / "x.pt", {}), "every": 2}
    whole, _ = taught(host, settings, machine=machines[0])
    with pytest.raises(KeyboardInterrupt):
        taught(host, settings, machine=machines[1], report=stop, **kept)
    again, heard = taught(host, settings, machine=machines[2], **kept)
    assert [schooled.step for schooled in heard] == [3, 4]
    assert machines[2].scaler.state_dict() == machines[0].scaler.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_training_of_something_else_does_not_go_on_and_hears_what_differs(host, tmp_path):
    def go_on(model="one", superclass=CREATURE, **more):
        kept = Checkpoint(tmp_path / "x.pt", {"model": model, "tower": "same"})
        return taught(host, Schooling(steps=1, batch=2, **more), superclass, checkpoint=kept)

    go_on()
    before = (tmp_path / "x.pt").read_bytes()
    with pytest.raises(ValueError, match=r"of a training with model one, and model two was asked for\. Give the same"):
        go_on(model="two")
    with pytest.raises(ValueError, match="with superclass creature, and superclass house was asked for"):
        go_on(superclass="house")
    with pytest.raises(ValueError, match="with seed 0, model one, and seed 1, model two was asked for"):
        go_on("two", seed=1)
    assert (tmp_path / "x.pt").read_bytes() == before
    assert go_on(accumulate=2)[1] == []  # it is done already


def test_a_loss_that_is_no_number_stops_before_it_is_learnt_from(host, tmp_path):
    with pytest.raises(Diverged, match=r"stopped at step 1: the loss is not a number\.$"):
        taught(host, Schooling(steps=2, batch=4, accumulate=4), weight=float("nan"),
               checkpoint=Checkpoint(tmp_path / "x.pt", {}))
    assert not list(tmp_path.iterdir())


def test_no_random_state_and_no_dropout_has_a_part_in_it(host):
    """So that a checkpoint need not hold any."""
    def disturbed(schooled):
        torch.manual_seed(7 * schooled.step)

    settings = Schooling(steps=3, batch=2)
    first, _ = taught(host, settings)
    dropouts = [(m, "p") for m in host.pipe.unet.modules() if isinstance(m, torch.nn.Dropout)]
    dropouts += [(m, "dropout") for m in host.pipe.text_encoder.modules() if hasattr(m, "dropout")]
    before = [getattr(*place) for place in dropouts]
    try:
        for module, name in dropouts:
            setattr(module, name, 0.9)
        torch.manual_seed(1)
        second, _ = taught(host, settings, report=disturbed)
    finally:
        for (module, name), p in zip(dropouts, before):
            setattr(module, name, p)
    assert {name for _, name in dropouts} == {"p", "dropout"}
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


class Elsewhere(Alone):
    """One of two processes, the other of which sees no checkpoint."""

    def reduce(self, tensor, reduction):
        return tensor / 2


def test_machines_that_do_not_share_a_checkpoint_do_not_go_on(host, tmp_path):
    kept = {"checkpoint": Checkpoint(tmp_path / "x.pt", {}), "every": 1}
    taught(host, Schooling(steps=1, batch=2), **kept)
    with pytest.raises(ValueError, match="in a folder that all machines share"):
        taught(host, Schooling(steps=1, batch=2), machine=Elsewhere(host), **kept)
