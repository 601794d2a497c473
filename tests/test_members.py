"""What a domain's pictures look like: members are taken for members, others are not."""

import torch

from perfusion.core.members import FEWEST, RIDGE, members_of

WIDTH = 24


def tokens(count, seed, shift=0.0):
    """Class tokens (count, 2, WIDTH) of one family: their numbers hang together, and lie along other lines where they
    are shifted."""
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).tril() + shift * torch.eye(WIDTH)
    return (torch.randn(count, 2, WIDTH, generator=torch.Generator().manual_seed(seed)) @ mix) + 3


def test_the_distance_is_mahalanobis():
    seen, other = tokens(300, 1), tokens(20, 2, shift=4.0)
    last = seen[:, 1].double()
    covariance = torch.cov(last.T, correction=0)
    covariance += RIDGE * covariance.trace() / WIDTH * torch.eye(WIDTH)
    apart = other[:, 1].double() - last.mean(0)
    wanted = (apart * torch.linalg.solve(covariance, apart.T).T).sum(1) / WIDTH
    torch.testing.assert_close(members_of(seen).distance(other).double(), wanted, rtol=1e-4, atol=0)


def test_hardly_any_member_is_far_and_most_others_are():
    known = members_of(tokens(2000, 1))
    assert known.far(tokens(2000, 2)).float().mean() < 0.01
    assert known.far(tokens(2000, 3, shift=4.0)).float().mean() > 0.8


def test_of_few_pictures_hardly_anything_is_far():
    assert not members_of(tokens(FEWEST, 1)).far(tokens(500, 2)).any()


def test_of_fewer_or_of_one_again_and_again_nothing_is_said():
    assert members_of(tokens(FEWEST - 1, 1)) is None
    assert members_of(tokens(1, 1).expand(100, -1, -1)) is None
