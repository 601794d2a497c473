"""The loop of a domain's training on a random miniature: what it shows, where it goes on, and how it stops."""

import pytest
import torch

from perfusion.bench import world
from perfusion.core import host_diffusers as hd
from perfusion.core.school import Alone, Schooling, train
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

    def data(rows, generator):
        return latents[rows], torch.full((len(rows), 1, 8, 8), weight), seen[rows], ["a photo of a {}"] * len(rows)

    with host.training(latents[:1]):
        course = Course(host, superclass, seen, latents, hidden=8)
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
    kept = {"checkpoint": tmp_path / "x.pt", "every": 2}
    whole, _ = taught(host, settings, machine=machines[0])
    with pytest.raises(KeyboardInterrupt):
        taught(host, settings, machine=machines[1], report=stop, **kept)
    again, heard = taught(host, settings, machine=machines[2], **kept)
    assert [schooled.step for schooled in heard] == [3, 4]
    assert machines[2].scaler.state_dict() == machines[0].scaler.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
