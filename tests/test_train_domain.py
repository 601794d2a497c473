"""The course of a domain on a random miniature: what it learns, what it leaves alone, and concepts encoded from it."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from perfusion.bench import world
from perfusion.core import host_diffusers as hd
from perfusion.core import key_lock
from perfusion.core.concept import dump, parse
from perfusion.core.encode import encode, far
from perfusion.core.encoder import Encoder
from perfusion.core.host_diffusers import DiffusersHost
from perfusion.core.members import Members
from perfusion.core.tower import of_transformers, prepare, tokens_of
from perfusion.core.train_domain import Course
from perfusion.core.tune import STEPS, STEPS_FROM_CONCEPT, TEMPLATES, Tuning, advised, tune
from perfusion.core.weight_offset import Offset, modulate

CREATURE, MIMI = "creature", "<mimi>"
HIDDEN = 32


def class_tokens(tower, images):
    return tokens_of(tower, images, Encoder.read)


@pytest.fixture(scope="module")
def pipe(miniature, tmp_path_factory):
    lines = world.sample(40, torch.Generator().manual_seed(1))["captions"]
    folder = miniature(tmp_path_factory.mktemp("demo"), lines)
    pipe = hd.load(folder)
    pipe.folder = folder
    return pipe


@pytest.fixture(scope="module")
def host(pipe):
    return DiffusersHost(pipe, CREATURE, pipe.folder)


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return of_transformers(CLIPVisionModel(CLIPVisionConfig(
        image_size=32, patch_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2)).eval())


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(4, 64, 64, 3, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def course(host, tower, pictures):
    return Course(host, CREATURE, class_tokens(tower, pictures), hidden=HIDDEN)


def batch(host, tower, pictures, seed=3):
    r, latents = torch.Generator().manual_seed(seed), host.latents(pictures)
    captions = ["a photo of a {}", "a {} in the snow", "the {} at night", "a big {}"]
    return (latents, torch.ones_like(latents[:, :1]), class_tokens(tower, pictures), captions,
            torch.randn(latents.shape, generator=r), torch.rand(4, generator=r))


def locked(host, i, output, bias=key_lock.TRAIN_BIAS):
    """The edit of a concept whose keys are locked to itself, with the gate of learning unless told otherwise."""
    d, _ = key_lock.direction(host.inverse_covariance()[0], i)
    one = torch.ones(1, 1)
    return key_lock.Edit(i[None], i[None], d.float()[None], one[0] * bias, one[0] * key_lock.TRAIN_TEMPERATURE,
                         {name: o[None] for name, o in output.items()}, one, one.expand(2, 1, 1))


def plain_values(host, i):
    return {name: module.weight.detach() @ i for name, module in host.projections.items() if name.endswith("to_v")}


def taught(course, host, data, steps=6):
    with host.training(data[0][:1]):
        optimizer, losses = torch.optim.AdamW(course.parameters(), lr=3e-3), []
        for _ in range(steps):
            with ExitStack() as undo:
                loss, _ = course(undo, *data)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def test_class_tokens_are_those_of_every_second_layer_of_the_middle_square(tower, pictures):
    wide = torch.cat([torch.zeros(4, 64, 10, 3), pictures, torch.zeros(4, 64, 10, 3)], 2)
    seen = class_tokens(tower, wide)
    assert seen.shape == (4, 2, 32) and torch.equal(seen, class_tokens(tower, pictures))
    states = tower.states(prepare(pictures, 32))
    torch.testing.assert_close(seen, torch.stack([states[1][:, 0], states[3][:, 0]], 1))


def test_a_course_begins_as_the_superclass_word_that_is_locked_to_itself(course, host, tower, pictures):
    latents, weight, seen, captions, noise, time = batch(host, tower, pictures)
    with host.training(latents[:1]), torch.no_grad():
        with ExitStack() as undo:
            loss, parts = course(undo, latents, weight, seen, captions, noise, time)
        context, at = host.encode([c.replace("{}", MIMI) for c in captions], MIMI, host.embedding(CREATURE))
        errors = []
        for k in range(len(latents)):
            i, rows = context[k, at[k]], slice(k, k + 1)
            with key_lock.edited(host.projections, locked(host, i, plain_values(host, i))):
                errors.append(host.errors(latents[rows], noise[rows], time[rows], context[rows], "").mean())
    assert parts["length"] == 0
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_a_course_learns_the_encoder_and_leaves_the_model_bit_for_bit(course, host, tower, pictures):
    models = host.pipe.unet, host.pipe.text_encoder
    before = [p.clone() for m in models for p in m.parameters()]
    losses = taught(course, host, batch(host, tower, pictures))
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, q) for p, q in zip(before, (p for m in models for p in m.parameters())))
    assert not any("forward" in vars(m) or m._forward_hooks for m in host.pipe.unet.modules())
    assert all(layer.weight.abs().max() > 0
               for layer in (*course.encoder.out.values(), *course.encoder.values.values()))


def test_what_weighs_nothing_teaches_nothing(course, host, tower, pictures):
    latents, weight, seen, captions, noise, time = batch(host, tower, pictures)
    whole, errors = weight.clone(), []
    host_errors = host.errors
    with host.training(latents[:1]), torch.no_grad(), ExitStack() as undo, pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "errors", lambda *of: errors.append(host_errors(*of)) or errors[-1])
        course(undo, latents, whole, seen, captions, noise, time)
    weight[:, :, :4] = 0
    with host.training(latents[:1]), ExitStack() as undo:
        loss, _ = course(undo, latents, weight, seen, captions, noise, time)
    torch.testing.assert_close(loss, errors[0][:, :, 4:].mean())


def test_an_untaught_domain_encodes_the_superclass_word(course, host, tower, pictures):
    seen = class_tokens(tower, pictures[:1])
    learnt = encode(host, course.domain(tower.hash, {}), seen, host.latents(pictures[:1]), CREATURE, MIMI)
    torch.testing.assert_close(learnt.embedding["clip_l"], host.embedding(CREATURE)["clip_l"])
    context, _ = hd.encode_prompts(host.pipe, [t.replace("{}", CREATURE) for t in TEMPLATES])
    i = learnt.target_input
    assert (context - i).square().sum(-1).min(1).values.max() < i.square().sum()
    assert torch.equal(learnt.key_input, i) and abs(learnt.direction @ i - 1) < 1e-4
    for name, o in learnt.target_output.items():
        torch.testing.assert_close(o, host.projections[name].weight.detach() @ i)


def test_a_taught_domain_encodes_the_picture_and_quick_tune_goes_on_from_it(course, host, tower, pictures):
    taught(course, host, batch(host, tower, pictures))
    domain = course.domain(tower.hash, {"steps": 6})
    made = [encode(host, domain, class_tokens(tower, pictures[k : k + 1]), host.latents(pictures[k : k + 1]), CREATURE,
                   MIMI) for k in range(2)]
    assert not torch.equal(made[0].embedding["clip_l"], made[1].embedding["clip_l"])
    again = encode(host, domain, class_tokens(tower, pictures[:1]), host.latents(pictures[:1]), CREATURE, MIMI)
    assert dump(again) == dump(made[0])
    concept = parse(dump(made[0]), "x")
    assert concept.domain == domain.hash and concept.training["steps"] == 0
    _, u = domain.encoder(class_tokens(tower, pictures[:1]))
    for name, o in plain_values(host, made[0].target_input).items():
        torch.testing.assert_close(made[0].target_output[name], o + u[name][0])
    tuned = tune(host, pictures[:1], CREATURE, MIMI, Tuning(steps=2, batch=2, resolution=64), start=concept)
    assert tuned.domain == domain.hash
    assert torch.equal(tuned.key_input, concept.key_input)
    assert all((tuned.target_output[n] - concept.target_output[n]).abs().max() > 0 for n in concept.target_output)


def test_several_pictures_are_the_mean_of_their_answers(course, host, tower, pictures):
    taught(course, host, batch(host, tower, pictures))
    domain = course.domain(tower.hash, {})
    three = encode(host, domain, class_tokens(tower, pictures[:3]), host.latents(pictures[:3]), CREATURE, MIMI)
    each = [encode(host, domain, class_tokens(tower, pictures[k : k + 1]), host.latents(pictures[k : k + 1]), CREATURE,
                   MIMI).embedding["clip_l"] for k in range(3)]
    assert torch.stack(each).std(0).mean() > 0
    torch.testing.assert_close(three.embedding["clip_l"], torch.stack(each).mean(0))


def near(seen, count):
    """Members of which the first `count` of these class tokens (m, l, w) are, and the others are not."""
    last = seen[:, -1]
    apart = (last - last[:count].mean(0)).square().sum(1)
    assert apart[:count].max() < apart[count:].min()
    limit = (apart[:count].max() + apart[count:].min()) / 2
    return Members(last[:count].mean(0), torch.eye(last.shape[1]), limit)


def test_a_picture_of_nothing_that_the_domain_knows_is_the_plain_word_and_is_learnt_as_without_a_domain(
        course, host, tower, pictures):
    taught(course, host, batch(host, tower, pictures))
    seen = class_tokens(tower, pictures)
    domain = replace(course.domain(tower.hash, {}), members=near(seen, 3))
    stray = encode(host, domain, seen[3:], host.latents(pictures[3:]), CREATURE, MIMI)
    assert stray.blank and stray.domain == "" and f"{STEPS} steps" in far(stray) and advised(stray) == STEPS
    torch.testing.assert_close(stray.embedding["clip_l"], host.embedding(CREATURE)["clip_l"])
    drawn, plain = (hd.pictures(host.pipe, [f"a photo of a {word}"], concepts, steps=2) for word, concepts in (
        (MIMI, [stray.at(1.0)]), (CREATURE, [])))
    assert torch.equal(drawn, plain)  # at any strength
    settings = Tuning(steps=2, batch=2, resolution=64)
    plain, from_stray = (tune(host, pictures[3:], CREATURE, MIMI, settings, start=start) for start in (
        None, parse(dump(stray), "x")))
    assert dump(plain) == dump(from_stray) and not plain.blank
    known = encode(host, domain, seen[:1], host.latents(pictures[:1]), CREATURE, MIMI)
    assert not known.blank and far(known) == "" and advised(known) == STEPS_FROM_CONCEPT


def test_pictures_of_something_else_are_left_out_of_the_mean_and_counted(course, host, tower, pictures):
    taught(course, host, batch(host, tower, pictures))
    seen = class_tokens(tower, pictures)
    domain = replace(course.domain(tower.hash, {}), members=near(seen, 2))
    both, all_four = (encode(host, domain, seen[:n], host.latents(pictures[:n]), CREATURE, MIMI) for n in (2, 4))
    assert far(all_four).endswith("knows: 2.") and not all_four.blank and all_four.domain == domain.hash
    assert all(torch.equal(o, all_four.target_output[name]) for name, o in both.target_output.items())


def test_a_domain_with_weight_offsets_encodes_what_values_answer_under_them(course, host, tower, pictures):
    r = torch.Generator().manual_seed(2)
    offsets = {name: Offset(*(0.1 * torch.randn(k, d, generator=r) for k, d in zip((3, 2), module.weight.shape)))
               for name, module in host.attention.items()}
    domain = replace(course.domain(tower.hash, {}), offsets=offsets)
    made = encode(host, domain, class_tokens(tower, pictures[:1]), host.latents(pictures[:1]), CREATURE, MIMI)
    for name, o in made.target_output.items():
        changed = modulate(host.projections[name].weight.detach(), offsets[name])
        torch.testing.assert_close(o, changed @ made.target_input)


def test_a_domain_of_another_model_is_refused(course, host, tower, pictures):
    domain = course.domain(tower.hash, {})
    domain.offsets["middle_block.1.other"] = Offset(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="middle_block.1.other"):
        encode(host, domain, class_tokens(tower, pictures[:1]), host.latents(pictures[:1]), CREATURE, MIMI)


def test_what_is_locked_at_the_words_own_encoding_is_what_the_values_answer(course, host, tower, pictures):
    """With the gate wide open, zero steps answer at i* with o*, and keys as if nothing was edited."""
    taught(course, host, batch(host, tower, pictures))
    domain = course.domain(tower.hash, {})
    made = encode(host, domain, class_tokens(tower, pictures[:1]), host.latents(pictures[:1]), CREATURE, MIMI)
    edit = locked(host, made.target_input, made.target_output, bias=-9)
    with torch.no_grad(), key_lock.edited(host.projections, edit) as meet:
        x = made.target_input[None, None]
        meet(x)
        for name, module in host.projections.items():
            plain = type(module).forward(module, x)
            wanted = plain if name.endswith("to_k") else made.target_output[name][None, None]
            torch.testing.assert_close(module(x), wanted, atol=1e-3, rtol=1e-3)
