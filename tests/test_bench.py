"""The bench itself: peers learn and leave nothing behind, runs can be repeated, and the table says what they said."""

import json
from types import SimpleNamespace

import pytest
import torch

from perfusion.bench import creatures, domain, e4t, examine, fidelity, peers, table, world
from perfusion.core import domain as domains
from perfusion.core import host_diffusers
from perfusion.core.fidelity import PROMPTS, Curve
from perfusion.core.host_diffusers import DiffusersHost
from perfusion.core.school import Schooling, train
from perfusion.core.tune import TEMPLATES
from perfusion.core.weight_offset import delta, modulated

every_peer = pytest.mark.parametrize("method", [method for method in creatures.RATES if method not in creatures.OURS])
SAMPLE = [(0, 0, 0.3), (0, 1, 0.7)]


@pytest.fixture(scope="module")
def folder(miniature, tmp_path_factory):
    lines = world.sample(40, torch.Generator().manual_seed(1))["captions"]
    return miniature(tmp_path_factory.mktemp("demo"), lines)


@pytest.fixture(scope="module")
def host(folder):
    return DiffusersHost(host_diffusers.load(folder), "creature", folder)


@pytest.fixture
def small(folder, tmp_path, monkeypatch):
    """A bench of few prompts, samples and steps, with files of its own."""
    values = {"SAMPLING": 2, "PROMPTS": 2, "OPEN": 2, "DEMO": folder, "STEPS": (0, 2),
              "DIALLED": {"perfusion": (2,), "quick-tune": ()},
              "RESULTS": tmp_path / "creatures.json", "runs_folder": lambda: tmp_path}
    for module in creatures, examine, table:
        for name, value in values.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    cached = examine.creature, examine.free_renders, creatures.best
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


def keep(folder, name, done):
    (folder / f"{name}.json").write_text(json.dumps(done, allow_nan=False), encoding="utf-8")


def weights(host):
    return {name: w.clone() for name, w in host.pipe.unet.state_dict().items()}


def steps(peer, n=2):
    latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    return [peer.step(latents, torch.ones(1, 1, 8, 8), SAMPLE, torch.Generator().manual_seed(2)) for _ in range(n)]


def learning(method, host, embedding=None, offsets=None):
    return peers.learning(method, host, "<mimi>", 1e-3, 1e-3, TEMPLATES, embedding or host.embedding("creature"),
                          offsets or {})


@every_peer
def test_a_peer_learns_and_puts_every_weight_back(host, method):
    before, asked = weights(host), [p.requires_grad for p in host.pipe.unet.parameters()]
    with host.training(torch.zeros(1, 8, 8, 8)), learning(method, host) as peer:
        losses = steps(peer, 4)
        assert losses[-1] < losses[0]
        kept = [torch.equal(m.weight, before[f"{name}.weight"])
                for name, m in host.pipe.unet.named_modules() if isinstance(m, torch.nn.Linear)]
        assert (method in ("textual-inversion", "e4t-tokens")) == all(kept)
        assert peer.bytes >= 2 * 128
    after = weights(host)
    assert before.keys() == after.keys() and all(torch.equal(w, after[name]) for name, w in before.items())
    assert [p.requires_grad for p in host.pipe.unet.parameters()] == asked


def test_peers_keep_the_bytes_of_what_they_learn(host):
    kept = {}
    for method in creatures.RATES:
        if method not in creatures.OURS:
            with learning(method, host) as peer:
                kept[method] = peer.bytes
    assert kept["textual-inversion"] == 2 * 128
    assert kept["textual-inversion"] < kept["lora"] < kept["custom-diffusion"] < kept["dreambooth"]
    assert kept["dreambooth"] > 2 * 5_000_000


def test_a_peer_that_has_learnt_nothing_draws_the_class_word(host):
    with learning("lora", host) as peer:
        drawn = peer.draw(["a <mimi> in the snow"], [3], sampling=2, guidance=3.0)
    plain = host_diffusers.pictures(host.pipe, ["a creature in the snow"], steps=2, guidance=3.0, seeds=[3])
    torch.testing.assert_close(drawn, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", e4t.KINDS)
def test_a_rival_domain_learns_and_what_is_tuned_from_it_begins_as_it_draws(host, kind, tmp_path):
    r = torch.Generator().manual_seed(1)
    latents, seen, heard = torch.randn(6, 8, 8, 8, generator=r), torch.randn(6, 2, 8, generator=r), []

    def data(rows, turns):
        return latents[rows], torch.ones(len(rows), 1, 8, 8), seen[rows], ["a photo of a {}"] * len(rows)

    with host.training(latents[:1]):
        course = e4t.Course(kind, host, "creature", seen)
        train(course, data, 6, Schooling(steps=20, batch=4, learning_rate=0.01), report=heard.append)
    assert heard[-1].numbers["error"] < heard[0].numbers["error"]
    learnt = domains.load(domains.save(course.domain("tower", {}), tmp_path / "x.safetensors"))
    assert bool(learnt.offsets) == (kind == "e4t-full")
    moved = [delta(offset).abs().max() for offset in learnt.offsets.values()]
    assert not moved or max(moved) > 1e-3
    before, prompts = weights(host), (["a <mimi> in the snow"], [3], 2, 3.0)
    with learning(kind, host, offsets=learnt.offsets) as peer:
        begun = peer.draw(*prompts)
    with modulated(host.attention, learnt.offsets), learning("textual-inversion", host) as plain:
        torch.testing.assert_close(begun, plain.draw(*prompts), atol=1e-5, rtol=0)
    assert all(torch.equal(w, before[name]) for name, w in weights(host).items())


def test_scored_creatures_prompts_differ_from_the_picture_and_searched_ones_are_of_another_split():
    for k in range(4):
        who, training, wanted = examine.creature("test", k)
        assert world.split_of("creature", who) == 0
        assert (wanted[:, : world.COMPANY] != training[:1, : world.COMPANY]).all()
        assert world.split_of("creature", examine.creature("dev", k)[0]) == 1


def test_a_run_can_be_repeated_and_its_table_says_what_it_said(host, small):
    one = ("perfusion", 0.1, "test", 0, 0, 1, 2)
    first, again = (creatures.run(host.pipe, *one) for _ in range(2))
    unlike = {"seconds", "peak_mb"}
    assert [{k: v for k, v in row.items() if k not in unlike} for row in first["rows"]] == [
        {k: v for k, v in row.items() if k not in unlike} for row in again["rows"]]
    assert [(row["steps"], row["strength"]) for row in first["rows"]] == [(0, .5), (2, .5), (2, .25), (2, .75), (2, 1.)]
    assert all(row["drift"] == 0 for row in first["rows"])  # prompts without the word are those of the base
    assert first["rows"][1]["peak_mb"] > 100 and first["rows"][0]["peak_mb"] is None
    keep(small, "test-0", first)
    keep(small, "test-1", creatures.run(host.pipe, "lora", 0.003, "test", 0, 0, 1, 2))
    found = table.results()
    row = next(row for row in found["rows"] if (row["method"], row["steps"], row["strength"]) == ("perfusion", 2, .5))
    assert row["identity"] == first["rows"][1]["identity"]
    assert set(row) == set("""method pictures steps strength n seeds learning_rate identity identity_sd identity_se top1
        colour shape pattern leak peak_mb alignment alignment_sd drift diversity seconds bytes""".split())
    assert row["n"] == 1 and row["identity_sd"] is None and row["learning_rate"] == 0.1
    assert next(row for row in found["rows"] if row["method"] == "lora")["strength"] is None
    assert {"commit", "machine", "seeds", "ceiling", "floor", "rows", "paired"} <= set(found)
    assert found["ceiling"]["identity"] > found["floor"]["identity"]
    assert {p["steps"] for p in found["paired"]} >= {0, 2} and "perfusion" in table.table(found)


def test_what_no_seed_can_change_is_drawn_once(host, small):
    assert [row["steps"] for row in creatures.run(host.pipe, "lora", 0.003, "test", 0, 1, 1, 2)["rows"]] == [2]


def test_quick_tune_begins_from_what_the_demos_domain_makes_of_the_picture(host, small):
    done = creatures.run(host.pipe, "quick-tune", 0.0, "test", 0, 0, 1, 2)
    words = creatures.run(host.pipe, creatures.RICH, 0, "test", 0, 0, 1, 0)
    kept = [{name: row[name] for name in ("identity", "alignment", "leak", "drift")} for row in done["rows"]]
    assert [row["strength"] for row in done["rows"]] == [1.0] * 2 and kept[0] == kept[1]  # a rate of 0 moves nothing
    assert done["domain"] == creatures.domain("quick-tune").hash and words["domain"] is None
    assert [row["steps"] for row in words["rows"]] == [0]
    keep(small, "test-0", done | {"rate": creatures.chosen()["quick-tune"]})
    keep(small, "test-1", words)
    found = table.results()
    assert {row["method"] for row in found["rows"]} == {"quick-tune", "rich-words"}
    assert {"2, 0"} <= {pair["steps"] for pair in found["paired"]}


def test_a_run_that_learns_no_number_ends_with_what_it_had(host, small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers.Peer, "step", lambda *arguments: float("nan"))
        done = creatures.run(host.pipe, "lora", 0.003, "test", 0, 0, 1, 2)
    assert [row["steps"] for row in done["rows"]] == [0]
    examiner = examine.Examiner(host.pipe, "test", 0)
    scores = examiner.scores(lambda prompts, seeds: torch.full((len(prompts), 128, 128, 3), float("nan")))
    assert set(scores.values()) == {None}


def test_copying_the_picture_is_likeness_without_alignment(host, small):
    examiner = examine.Examiner(host.pipe, "test", 0)
    own = world.render("creature", examiner.who, examiner.training[:1])[0].movedim(1, -1)
    scores = examiner.scores(lambda prompts, seeds: own.expand(len(prompts), -1, -1, -1))
    assert scores["alignment"] < 0.25 and scores["leak"] > 0.7 and scores["top1"] == 1
    assert scores["identity"] > 0.5


def searched(folder, creature, rate, identity, steps=5):
    rows = [{"steps": at, "strength": None, "identity": 0.99 if not at else identity, "alignment": 0.9}
            for at in (0, steps)]
    keep(folder, f"dev-{creature}-{rate}", {"method": "lora", "rate": rate, "creature": creature, "seed": 0,
                                            "pictures": 1, "rows": rows})


def test_a_method_is_scored_at_the_rate_that_did_best_on_other_creatures(small):
    for rate, identity in zip(creatures.RATES["lora"], (0.2, 0.5, 0.3)):
        searched(small, 0, rate, identity)
    searched(small, 1, creatures.RATES["lora"][2], 0.9)  # a creature on which the others were not tried yet
    assert creatures.best() == {"lora": (creatures.RATES["lora"][1], 5)}
    assert creatures.chosen()["lora"] == creatures.RATES["lora"][1]
    assert creatures.chosen()["dreambooth"] == creatures.RATES["dreambooth"][1]  # not searched: the middle one


def test_half_a_search_chooses_nothing(small):
    searched(small, 0, creatures.RATES["lora"][0], 0.9)
    assert creatures.best() == {}


def test_shards_share_all_runs_out_and_share_none():
    arguments = SimpleNamespace(search=0, first=0, n=5, seeds=2, methods=["perfusion", "lora"], pictures=1, steps=50)
    every = list(creatures.runs(arguments))
    assert len(every) == len(set(every)) == 20
    shares = [creatures.share(every, f"{shard}/3") for shard in range(3)]
    assert sorted(sum(shares, [])) == sorted(every) and all(shares)


def test_errors_are_over_creatures_after_seeds_and_pairs_are_of_what_both_had():
    def rows(values):
        return {at: dict.fromkeys(table.MEANS, 0.0) | {"identity": value, "bytes": 10} for at, value in values.items()}

    ours = rows({(0, 0): 0.4, (0, 1): 0.6, (1, 0): 0.7, (2, 0): 0.9, (3, 0): None})
    row = table.row(("perfusion", 1, 5, 0.5), ours, 0.03)
    assert row["identity"] == pytest.approx(0.7) and row["n"] == 4 and row["seeds"] == 2 and row["bytes"] == 10
    assert row["identity_sd"] == pytest.approx(0.2) and row["identity_se"] == pytest.approx(0.2 / 3**0.5, abs=1e-5)
    theirs = rows({(0, 0): 0.3, (1, 0): 0.4, (7, 0): 0.0})
    pair = next(table.paired("perfusion", "lora", ours, theirs, 5))
    assert (pair["n"], pair["metric"]) == (2, "identity")
    assert pair["mean"] == pytest.approx(0.25) and pair["se"] == pytest.approx(0.05, abs=1e-5)


def test_at_level_alignment_a_dial_is_read_between_its_strengths():
    def rows(**of):
        return {(k, 0): of for k in range(3)}

    dial = {0.5: rows(identity=0.3, alignment=1.0), 1.0: rows(identity=0.5, alignment=0.9)}
    for alignment, ours in (0.95, 0.4), (0.975, 0.35), (0.8, 0.5), (1.2, 0.3):
        other = rows(identity=0.1, alignment=alignment)
        pair, = table.level("quick-tune", "lora", dial, other, 5)
        assert pair["mean"] == pytest.approx(ours - 0.1) and pair["steps"] == "5, level" and pair["n"] == 3
    assert list(table.level("quick-tune", "lora", {}, other, 5)) == []


def test_a_domains_captions_say_the_context_and_nothing_of_who_it_is(tmp_path):
    domain.draw(tmp_path, domain.CHUNK)
    who = {words for factor in world.FACTORS["creature"] for words in factor.words}
    assert len(list(tmp_path.glob("*.png"))) == domain.CHUNK
    for path in tmp_path.glob("*.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == domain.WORDINGS and all(line.count("{}") == 1 for line in lines)
        assert not [words for line in lines for words in who if f" {words} " in f" {line} "]


def measured(identity, alignment, likeness, obedience):
    """A creature with one concept, as `fidelity.measured` has it."""
    curve = Curve(fidelity.STRENGTHS, tuple(likeness), tuple(obedience), "", PROMPTS, 0)
    return {"encoded": {"identity": identity, "alignment": alignment, "curve": curve, "class token": obedience}}


def test_a_rule_for_strength_is_scored_by_the_truth_and_not_by_the_curve():
    every = [measured([0, 0.1, 0.2, 0.3, 0.4 + k], [1, 1, 0.9, 0.9, 0.6 - k], [0, 0.1, 0.2, 0.3, 0.4],
                      [1, 0.9, 0.8, 0.7, 0.5]) for k in (0, 0.01)]
    of = fidelity.summary(every)
    rules = of["rules"]
    assert rules["always .75"]["over .75"] == rules["always 1"]["over 1"] == (0, 0)
    assert rules["the best by the truth"]["score"][0] == pytest.approx(1.2) == rules["always .75"]["score"][0]
    assert rules["the knee"]["strength"][0] == pytest.approx(0.88)  # .7 to .5: half of the way from .75 to 1
    assert rules["the knee"]["score"][0] == pytest.approx(1.2 - 0.2 * 0.13 / 0.25, abs=1e-4)
    assert rules["nine tenths of the likeness"]["strength"][0] == 1
    assert of["correlation"]["likeness with identity"][0] == pytest.approx(1, abs=1e-3) and of["no correlation"] == 0
    every.append(measured([0, 0.1, 0.2, 0.3, 0.4], [1.0] * 5, [0, 0.1, 0.2, 0.3, 0.4], [1, 0.9, 0.8, 0.7, 0.5]))
    left_out = fidelity.summary(every)
    assert left_out["no correlation"] == 1
    assert left_out["correlation"]["obedience with alignment"] == of["correlation"]["obedience with alignment"]
