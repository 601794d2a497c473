"""What the bench measures: the ends of the scores on true numbers, and that the reader reads, a little blurred too."""

import pytest
import torch

from perfusion.bench import degrade, metrics, world
from perfusion.bench import reader as judge

every_superclass = pytest.mark.parametrize("name", world.SUPERCLASSES)
every_change = pytest.mark.parametrize("change", metrics.CHANGES)
N = metrics.GALLERY
IDENTITY = {"creature": .87, "house": .82, "flower": .73}  # what true held-out pictures reach at least, also degraded
TOP1 = {"creature": .98, "house": .97, "flower": .90}
PARTS = {"colour": .88, "shape": .87, "pattern": .79}  # of creatures


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def people(name, n=3000, seed=0):
    return world.identities(n, "train", name, seeded(seed))


@pytest.fixture(scope="module")
def reader():
    return judge.load()


@pytest.fixture(scope="module")
def held():
    return {name: metrics.held_out(name) for name in world.SUPERCLASSES}


@pytest.fixture(scope="module")
def ceilings(reader, held):
    return {(name, change): metrics.ceiling(reader, name, held[name], change)
            for name in world.SUPERCLASSES for change in metrics.CHANGES}


def told(context):
    """A read that is sure of contexts (m, c), and of nothing else."""
    sure = torch.zeros(len(context), len(judge.NAMED), max(judge.VALUES))
    sure.scatter_(2, context[:, judge.NAMED, None], 1.)
    return judge.Read(torch.full((len(context), 3, 3), 1 / 3), torch.zeros(0), sure, torch.zeros(0))


# ---- on true numbers

@every_superclass
def test_the_same_identity_scores_one_and_a_random_other_zero(name):
    who, other = people(name), people(name, seed=1)
    for part in metrics.identity(name, judge.embed(name, who), who).values():
        torch.testing.assert_close(part, torch.ones(len(who)))
    pair = metrics.identity(name, judge.embed(name, other), who)
    assert set(pair) == {"identity", *world.GROUPS} and all(abs(part.mean()) < .05 for part in pair.values())


@every_superclass
def test_the_mean_is_not_rewarded_but_where_a_guess_is_scored(name):
    who = people(name)
    mean = judge.embed(name, people(name, seed=1)).mean(0).expand(len(who), -1)
    for part in metrics.identity(name, mean, who).values():
        assert abs(part.mean()) < .05
    assert abs(metrics.identity(name, mean, who, guess=True)["identity"].mean() - .5) < .05


def test_single_factors_score_as_they_are_defined():
    base = people("creature", 1)
    for factor, (before, after), score in (
            ("hue", (.2, .7), -1), ("hue", (.2, .45), 0), ("hue", (.98, .02), .9686), ("head", (0, 1), -5),
            ("head", (.5, .6), .94), ("ears", (0, 2), -1 / 3), ("pattern", (0, 4), -.25)):
        k = [f.name for f in world.FACTORS["creature"]].index(factor)
        one, other = base.clone(), base.clone()
        one[:, k], other[:, k] = before, after
        found = metrics.scores("creature", judge.embed("creature", one), judge.embed("creature", other))[0]
        assert found[k] == pytest.approx(score, abs=1e-3) and (found.sum() - found[k]) == pytest.approx(11, abs=1e-4)


@every_superclass
def test_the_named_factors_are_those_with_words_and_can_be_judged_alone(name):
    named = metrics.parts_factors_named(name)
    assert [bool(f.words) for f in world.FACTORS[name]] == [k in named for k in range(12)]
    who, other = people(name, 200), people(name, 200, seed=1)
    other[:, named] = who[:, named]
    whole, part = (metrics.identity(name, judge.embed(name, other), who, factors)["identity"].mean()
                   for factors in (None, named))
    assert part == pytest.approx(1) and whole < .9


@every_superclass
def test_the_nearest_of_the_gallery_is_the_right_one_and_chance_finds_few(name):
    gallery, index = people(name, N), torch.arange(N)
    assert metrics.top1(name, judge.embed(name, gallery), gallery, index).all()
    strangers = judge.embed(name, people(name, 4 * N, seed=1))
    assert metrics.top1(name, strangers, gallery, index.repeat(4)).mean() < .06


def test_alignment_and_leak_are_told_apart():
    training = world.contexts(300, seeded())
    wanted = world.unlike(training, seeded(1))
    assert metrics.alignment(told(wanted), wanted).eq(1).all() and metrics.alignment(told(training), wanted).eq(0).all()
    assert metrics.leak(told(wanted), wanted, training).eq(0).all()
    assert metrics.leak(told(training), wanted, training).eq(1).all()


def test_leak_counts_what_was_left_open_and_chance_is_known():
    training = world.contexts(3000, seeded(2))
    wanted, open_ = training.clone(), ("background", "style")
    drawn = training.clone()
    for k in (world.BACKGROUND, world.STYLE):
        drawn[:, k] = world.contexts(3000, seeded(3))[:, k]
    assert metrics.leak(told(training), wanted, training).isnan().all()  # there is nothing that could leak
    assert metrics.leak(told(training), wanted, training, open_).eq(1).all()
    chance = metrics.leak_by_chance(wanted, training, open_).mean()
    assert metrics.leak(told(drawn), wanted, training, open_).mean() == pytest.approx(chance.item(), abs=.03)


def test_drift_is_zero_only_where_nothing_changed(held):
    pictures = held["creature"]["pictures"][:4]
    moved = pictures.clone()
    moved[1, 0, 5, 5] += .1
    assert (metrics.drift(pictures, moved) > 0).tolist() == [False, True, False, False]


def test_diversity_is_one_for_real_pictures_and_zero_for_copies():
    features = torch.randn(5, 4, 112, generator=seeded())
    torch.testing.assert_close(metrics.diversity(features, features), torch.ones(5))
    assert metrics.diversity(features[:, :1].expand(-1, 4, -1), features).abs().max() < 1e-4


def test_held_out_identities_are_of_the_test_split_and_their_contexts_unlike(held):
    for name, found in held.items():
        assert (world.split_of(name, found["identity"]) == 0).all()
        assert (found["wanted"] != found["training"]).all()


# ---- the reader

def test_the_reader_is_small():
    assert judge.WEIGHTS.stat().st_size < 2 * 1024 ** 2


@every_superclass
@every_change
def test_true_pictures_score_high_on_everything(ceilings, name, change):
    found = {key: part.mean().item() for key, part in ceilings[name, change].items()}
    assert found["identity"] > IDENTITY[name] and found["top1"] > TOP1[name]
    assert found["alignment"] > .98 and found["leak"] < .02
    if name == "creature" and change == "clean":
        assert all(found[part] > least for part, least in PARTS.items())


@every_superclass
def test_another_member_scores_about_zero_in_the_right_context(reader, held, name):
    found = metrics.floor(reader, name, held[name])
    assert abs(found["identity"].mean()) < .06 and found["top1"].mean() < .06 and found["alignment"].mean() > .93


@every_superclass
def test_a_copy_of_the_training_picture_has_the_identity_and_none_of_the_alignment(reader, held, ceilings, name):
    found = held[name]
    read = reader.read(found["copied"])
    copied = metrics.summary(name, read, found["identity"], found["wanted"], found["training"])
    assert copied["identity"].mean() > .9 * ceilings[name, "clean"]["identity"].mean()
    assert copied["alignment"].mean() < .05 and copied["leak"].mean() > .9


@every_superclass
def test_pictures_of_nothing_score_no_more_than_the_floor(reader, held, name):
    found = held[name]
    for nothing in (torch.full((N, 3, 128, 128), .5), torch.rand(N, 3, 128, 128, generator=seeded())):
        score = metrics.summary(name, reader.read(nothing), found["identity"], found["wanted"], found["training"])
        assert score["identity"].mean() < .05 and score["top1"].mean() < .06 and score["alignment"].mean() < .4


def test_two_subjects_that_changed_sides_are_misplaced(reader):
    n = 24
    who = world.identities(n, "test", "creature", seeded(5))
    second = torch.ones(n, dtype=torch.long), world.identities(n, "test", "house", seeded(6))
    wanted = world.contexts(n, seeded(7), company="two")
    swapped = wanted.clone()
    swapped[:, world.PLACE] = 2 - wanted[:, world.PLACE]
    reads = [reader.read(world.render("creature", who, context, second)[0]) for context in (wanted, swapped)]
    right, wrong = (metrics.right(read, wanted, "creature")[:, metrics.PLACE].mean() for read in reads)
    assert right > .9 and wrong < .1


def test_training_pictures_are_degraded_within_range_and_the_same_each_time(held):
    pictures, context = held["house"]["pictures"], held["house"]["wanted"]
    first, again = (degrade.degraded(pictures, context, seeded(8)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == pictures.shape
    assert first.min() >= 0 and first.max() <= 1 and (first - pictures).abs().mean() > .005


def test_a_slight_blur_changes_nothing_and_a_strong_one_keeps_the_mean(held):
    pictures = held["flower"]["pictures"][:3]
    torch.testing.assert_close(degrade.blurred(pictures, .1), pictures)
    strong = degrade.blurred(pictures, torch.tensor([1., 2., 4.]))
    torch.testing.assert_close(strong.mean((2, 3)), pictures.mean((2, 3)), atol=.02, rtol=0)
    assert ((strong - pictures).abs().mean((1, 2, 3)).diff() > 0).all()
