"""The small world: what is drawn, what is said of it, and which identities are kept from training."""

import pytest
import torch

from perfusion.bench import world

N = 48
every_superclass = pytest.mark.parametrize("name", world.SUPERCLASSES)
every_split = pytest.mark.parametrize("split", world.SPLITS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn():
    return world.sample(N, seeded())


def neutral(n, **other):
    return world.contexts(n, seeded(), **{"company": "alone", "thing": "none", "style": "flat"} | other)


def words(caption):
    return caption.replace(",", " ,").split()


def named(drawn, which=""):
    return drawn[f"{which}superclass"], drawn[f"{which}identity"]


def test_the_same_seed_gives_the_same_world_and_another_seed_another(drawn):
    again, other = world.sample(N, seeded()), world.sample(N, seeded(1))
    for key, value in drawn.items():
        same = torch.equal if isinstance(value, torch.Tensor) else list.__eq__
        assert same(value, again[key]) and not same(value, other[key]), key


def test_pictures_do_not_depend_on_what_they_are_drawn_together_with(drawn):
    rows = slice(5, 25)
    second = tuple(t[rows] for t in named(drawn, "second_"))
    pictures, masks = world.render(*(t[rows] for t in named(drawn)), drawn["context"][rows], second)
    torch.testing.assert_close(pictures, drawn["pictures"][rows], rtol=0, atol=1e-5)
    torch.testing.assert_close(masks, drawn["masks"][rows], rtol=0, atol=1e-5)


def test_pictures_and_masks_are_in_range_and_the_subjects_are_seen(drawn):
    pictures, masks, two = drawn["pictures"], drawn["masks"], drawn["context"][:, world.COMPANY] == world.TWO
    assert pictures.shape == (N, 3, 128, 128) and masks.shape == (N, 3, 128, 128)
    for t in (pictures, masks):
        assert t.isfinite().all() and t.min() >= 0 and t.max() <= 1
    assert masks.sum(1).max() <= 1 + 1e-5 and 0 < two.sum() < N
    seen = masks.mean((2, 3))
    assert (seen[:, 2] > .002).equal(drawn["context"][:, world.THING] > 0)
    assert seen[:, 0].min() > .02 and seen[two, 1].min() > .01 and not seen[~two, 1].any()


@every_superclass
def test_without_its_subject_a_picture_is_the_same_outside_the_mask(name):
    context = neutral(12, size="large", place="middle")
    one, other = (world.identities(12, "train", name, seeded(k)) for k in (1, 2))
    (a, on), (b, there) = (world.render(name, who, context) for who in (one, other))
    cover = torch.maximum(on, there)[:, :1]
    differ = (a - b).abs().amax(1, keepdim=True)
    assert differ[cover == 0].max() < 1e-6  # and so the mask covers all that is drawn of a subject
    assert differ[cover > .5].mean() > .1


@every_superclass
def test_every_factor_changes_the_picture_inside_the_mask_alone(name):
    who = world.identities(12, "train", name, seeded(3))
    for k, factor in enumerate(world.FACTORS[name]):
        changed, context = who.clone(), neutral(12, size="large", place="middle")
        step = (who[:, k] + 1) % factor.classes if factor.classes else (who[:, k] + .5) % 1
        changed[:, k] = step
        (a, on), (b, there) = (world.render(name, x, context) for x in (who, changed))
        differ, cover = (a - b).abs().amax(1), torch.maximum(on, there)[:, 0]
        assert differ[cover == 0].max() < 1e-6, factor.name
        assert (differ > .1).float().mean((1, 2)).min() > .001, factor.name  # of every subject, 16 pixels at least


def test_every_context_column_changes_the_picture():
    who = world.identities(1, "train", "creature", seeded()).expand(40, -1)
    for k, column in enumerate(world.CONTEXT):
        n = len(column.values)
        context = neutral(1, place="left", background="meadow").expand(n, -1).clone()
        context[:, k] = torch.arange(n)
        pictures, _ = world.render("creature", who[:n], context)
        apart = (pictures[:, None] - pictures).abs().mean((2, 3, 4)) + torch.eye(n)
        assert apart.min() > .002, column.name


@every_superclass
@every_split
def test_identities_are_of_their_split_and_differ(name, split):
    who = world.identities(2000, split, name, seeded())
    assert who.shape == (2000, 12) and torch.isin(world.split_of(name, who), torch.tensor(world.SPLITS[split])).all()
    assert len(who.unique(dim=0)) == 2000
    for k, factor in enumerate(world.FACTORS[name]):  # nothing is missing from any split
        assert len(factor.bin(who[:, k]).unique()) == factor.bins


def test_the_splits_share_nothing_and_leave_nothing_out():
    sums = [n for split in world.SPLITS.values() for n in split]
    assert sorted(sums) == list(range(world.MODULUS))


@every_superclass
def test_a_step_of_one_factor_leaves_the_split_sum(name):
    who = world.identities(200, "test", name, seeded())
    for k, factor in enumerate(world.FACTORS[name]):
        for step in range(1, factor.bins):
            moved = who.clone()
            moved[:, k] = (who[:, k] + (step if factor.classes else step / factor.bins)) % (factor.classes or 1)
            changed = world.bins(name, moved)[:, k] != world.bins(name, who)[:, k]
            assert (world.split_of(name, moved)[changed] != 0).all(), factor.name


@every_split
def test_samples_keep_to_their_split(split):
    found = world.sample(64, seeded(4), split)
    for which in ("", "second_"):
        kinds, who = named(found, which)
        for k, name in enumerate(world.SUPERCLASSES):
            assert torch.isin(world.split_of(name, who[kinds == k]), torch.tensor(world.SPLITS[split])).all()


def facts(n, seed):
    """Contexts and two subjects each, without pictures."""
    draw = seeded(seed)
    kinds = torch.randint(3, (2, n), generator=draw)
    who = torch.stack([torch.cat([world.identities(1, "train", world.SUPERCLASSES[k], draw) for k in row])
                       for row in kinds.tolist()])
    return kinds[0], who[0], world.contexts(n, draw), (kinds[1], who[1])


def test_captions_use_the_vocabulary_alone_and_all_of_it():
    kinds, who, context, second = facts(500, 5)
    said = world.captions(kinds, who, context, second, seeded(1)) + world.captions(
        kinds, who, context, second, seeded(2)) + world.rich_caption(kinds, who, context, second)
    used = {word for caption in said for word in words(caption)}
    assert used == set(world.WORDS) and len(world.WORDS) <= 250
    assert all(word == "," or word.isalpha() and word.islower() for word in world.WORDS)
    assert max(len(words(caption)) for caption in said) < 75


def test_captions_say_nothing_of_the_factors_that_are_held_back():
    kinds, who, context, second = facts(100, 6)
    others = [who.clone(), second[1].clone()]
    for other, classes in zip(others, (kinds, second[0])):
        for k, name in enumerate(world.SUPERCLASSES):
            for column, factor in enumerate(world.FACTORS[name]):
                if not factor.words:
                    other[classes == k, column] = 1 - 1e-6 if factor.kind != "categorical" else factor.classes - 1.
    for say in (world.captions, world.rich_caption):
        assert say(kinds, who, context, second, seeded()) == say(
            kinds, others[0], context, (second[0], others[1]), seeded())
    for factors in world.FACTORS.values():
        held = {factor.group for factor in factors if not factor.words}
        assert held == set(world.GROUPS)  # something of every kind is left for a picture to teach


def test_captions_leave_out_a_share_of_the_context():
    kinds, who, context, second = facts(400, 7)
    said = world.captions(kinds, who, context, second, seeded())
    places = [any(place in caption for phrases in world.CONTEXT[world.PLACE].phrases for place in phrases)
              for caption in said]
    assert abs(sum(places) / 400 - world.NAMED) < .06
    assert len(set(said)) > 390


def test_rich_captions_tell_bins_and_contexts_apart():
    kinds, who, context, _ = facts(60, 8)
    said = world.rich_caption(kinds, who, context)
    for k, name in enumerate(world.SUPERCLASSES):
        for row in (kinds == k).nonzero()[:, 0].tolist():
            for factor, value in zip(world.FACTORS[name], world.bins(name, who[row: row + 1])[0].tolist()):
                assert not factor.words or factor.words[value] in said[row]
    for row, values in enumerate(context.tolist()):
        for column, value in zip(world.CONTEXT, values):
            if column.phrases and column.name != "company":
                assert column.phrases[value][0] in said[row]


def test_a_word_stands_in_captions_for_a_subject():
    context = world.contexts(50, seeded())
    said = world.context_caption(context, "<mimi>")
    assert all(caption.count("<mimi>") == 1 for caption in said)
    assert [caption.replace("<mimi>", "creature") for caption in said] == world.context_caption(context, "creature")
    two = context[:, world.COMPANY] == world.TWO
    assert [("beside a house" in caption) for caption in said] == two.tolist()
    short = world.context_caption(context, "<mimi>", leave_out=("background", "place"))
    for k in (world.BACKGROUND, world.PLACE):
        assert not any(p in caption for caption in short for phrases in world.CONTEXT[k].phrases for p in phrases)


def test_unlike_differs_in_every_column_and_can_be_drawn():
    context = world.contexts(3000, seeded())
    other = world.unlike(context, seeded(1))
    assert (context != other).all()
    sizes = torch.tensor([len(column.values) for column in world.CONTEXT])
    assert ((other >= 0) & (other < sizes)).all()
    for c in (context, other):
        assert not ((c[:, world.COMPANY] == world.TWO) & (c[:, world.PLACE] == world.MIDDLE)).any()
