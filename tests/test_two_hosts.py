"""ComfyUI and diffusers with the same weights: the same encodings, predictions, errors and covariance, to the digits.

Two programs that share no code of a model; where they agree, what the pack reads and edits is what it should be.
"""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import comfy.utils
import pytest
import torch
from comfy import sd1_clip
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from perfusion.bench import mini_models
from perfusion.core import apply as applying
from perfusion.core import demo_comfy, host_comfy, weight_offset
from perfusion.core import host_diffusers as hd
from perfusion.core.acting import Acting
from perfusion.core.acting_diffusers import acting, texts_of
from perfusion.core.concept import dump, parse
from perfusion.core.covariance import PACKAGED
from perfusion.core.joint_edit import JointEdit
from perfusion.core.key_lock import edited
from perfusion.core.tune import Tuning, tune

pytestmark = pytest.mark.host

DEMO = Path(__file__).parent.parent / "demo"
KINDS = "sd1", "sd2-v", "sdxl", "creature"
MIMI, REX, OTHER = "<mimi>", "<rex>", "house"
CAT = {"creature": "creature"}  # the superclass, where it is not a cat
PICTURE = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(7))
TUNING = Tuning(steps=2, batch=1, resolution=64, templates=("a photo of a {}", "the {} in the snow"))
# the second and the fourth name no concept
PROMPTS = ["a photo of a {mimi}, red", "", "{mimi} beside a {rex}", "a big tree in the snow", "the {rex}"]
CONFIGS = {  # of the UNets in checkpoints.py
    "sd1": dict(block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=(2, 4),
                down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2),
    "sd2": dict(block_out_channels=(32, 32, 64), layers_per_block=3, cross_attention_dim=96,
                attention_head_dim=(2, 2, 4), use_linear_projection=True,
                down_block_types=(*("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
                up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 2)),
    "sdxl": dict(block_out_channels=(32, 32, 64), layers_per_block=1, cross_attention_dim=160,
                 attention_head_dim=(2, 2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 1, 2),
                 down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
                 up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"), addition_embed_type="text_time",
                 addition_time_embed_dim=256, projection_class_embeddings_input_dim=96 + 6 * 256),
}


def text_model(clip, name, layers=3):
    """A text encoder of ComfyUI as one of transformers, with its first layers."""
    state = getattr(clip.cond_stage_model, name).transformer.state_dict()
    width = state["text_projection.weight"].shape[0]
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_attention_heads=4, projection_dim=width,
        num_hidden_layers=layers, hidden_act="quick_gelu" if name == "clip_l" else "gelu", max_position_embeddings=77,
        bos_token_id=49406, eos_token_id=49407,
    )
    model = (CLIPTextModelWithProjection if name == "clip_g" else CLIPTextModel)(config)
    state = {key if name == "clip_g" else key.removeprefix("text_model."): t for key, t in state.items()}
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    return model.eval()


def pipeline_of(kind, model, clip):
    """A tiny checkpoint that ComfyUI has loaded, as a diffusers pipeline."""
    family = kind.split("-")[0]
    unet, state = UNet2DConditionModel(**CONFIGS[family]), model.model.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    unet.load_state_dict({name: state[names[name]] for name in unet.state_dict()})
    folder = f"{sd1_clip.__file__.removesuffix('.py').removesuffix('sd1_clip')}sd1_tokenizer"
    parts = dict(
        unet=unet.eval(), vae=AutoencoderTiny(), tokenizer=CLIPTokenizer.from_pretrained(folder, model_max_length=77),
        scheduler=DDIMScheduler(**mini_models.SCHEDULE | {
            "prediction_type": "v_prediction" if kind.endswith("-v") else "epsilon"}),
    )
    if family == "sdxl":
        second = {"tokenizer_2": CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="!"),
                  "text_encoder_2": text_model(clip, "clip_g")}
        return StableDiffusionXLPipeline(text_encoder=text_model(clip, "clip_l"), **second, **parts)
    if family == "sd2":  # whose folders leave out the last layer, and pad with another token
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="!")
    text = text_model(clip, "clip_h", layers=2) if family == "sd2" else text_model(clip, "clip_l")
    return StableDiffusionPipeline(text_encoder=text, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False, **parts)


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """Of a kind both hosts, and two concepts that the diffusers host has learnt, as their files have them."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind == "creature":
                shutil.copytree(DEMO, folder, dirs_exist_ok=True)
                parts, pipe = demo_comfy.load(folder)[:3], hd.load(folder)
            else:
                lines = PACKAGED.read_text(encoding="utf-8").splitlines()[::64]
                (folder / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
                parts = tiny(kind)
                pipe = pipeline_of(kind, *parts[:2])
            cat = CAT.get(kind, "cat")
            mimi, rex = (
                tune(hd.DiffusersHost(pipe, superclass, folder), PICTURE[k : k + 1], superclass, word, TUNING)
                for k, (word, superclass) in enumerate(((MIMI, cat), (REX, OTHER))))
            made[kind] = SimpleNamespace(
                kind=kind, pipe=pipe, model=parts[0], clip=parts[1], folder=folder, cat=cat,
                comfy=lambda folder=folder: host_comfy.ComfyHost(*parts, cat, folder),
                diffusers=lambda folder=folder: hd.DiffusersHost(pipe, cat, folder),
                concepts=tuple(parse(dump(c.at(0.8)), c.word) for c in (mimi, rex)))
        return made[kind]

    with pytest.MonkeyPatch.context() as patch:  # the tiny UNets read text of these widths
        patch.setitem(hd.FAMILIES, 64, "sd1")
        patch.setitem(hd.FAMILIES, 96, "sd2")
        yield get


def draw(w, b, seed=0):
    c = w.pipe.unet.config.in_channels
    return (torch.randn(b, c, 8, 8, generator=torch.Generator().manual_seed(seed + k)) for k in range(2))


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_projections_are_the_same_modules_by_name(pair, kind):
    w = pair(kind)
    theirs, ours = applying.projections(w.model.model.diffusion_model), hd.projections(w.pipe.unet)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].weight.float(), ours[name].weight) for name in ours)


@every_kind
def test_attention_is_the_same_modules_by_name(pair, kind):
    w = pair(kind)
    theirs, ours = weight_offset.attention(w.model.model.diffusion_model), hd.attention(w.pipe.unet)
    assert theirs.keys() == ours.keys() and len(ours) == 3 * len(hd.projections(w.pipe.unet))
    assert all(torch.equal(theirs[name].weight.float(), ours[name].weight) for name in ours)


@every_kind
def test_the_features_agree_and_leave_nothing_behind(pair, kind):
    w = pair(kind)
    times = torch.tensor([0.1234, 0.77777])
    latents, noise = draw(w, 2)
    found, widths = [], w.pipe.unet.config.block_out_channels
    for host in w.comfy(), w.diffusers():
        with host.training(latents[:1]):
            found.append(host.features(latents, noise, times))
    assert len(found[1]) == len(widths) * (w.pipe.unet.config.layers_per_block + 1) + 1
    assert not any(x.requires_grad for x in found[0] + found[1])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert not any(m._forward_hooks for m in (*w.pipe.unet.modules(), *w.model.model.diffusion_model.modules()))


@every_kind
def test_errors_under_weight_offsets_agree_with_those_of_changed_weights(pair, kind):
    w = pair(kind)
    latents, noise = draw(w, 1)
    context, _ = hd.encode_prompts(w.pipe, [f"a photo of a {w.cat}"])
    about = noise, torch.tensor([0.4]), context, f"a photo of a {w.cat}"
    found, plain, r = [], [], torch.Generator().manual_seed(5)
    offsets = {name: weight_offset.Offset(0.2 * torch.randn(factors.output.shape, generator=r), factors.input.detach())
               for name, factors in weight_offset.start(hd.attention(w.pipe.unet)).items()}
    for host in w.comfy(), w.diffusers():
        with host.training(latents), torch.no_grad():
            plain.append(host.errors(latents, *about))
            with weight_offset.modulated(host.attention, offsets):
                found.append(host.errors(latents, *about))
    unet = copy.deepcopy(w.pipe.unet)
    for name, module in hd.attention(unet).items():
        module.weight.data = weight_offset.modulate(module.weight.data, offsets[name])
    with torch.no_grad():
        host = w.diffusers()
        host.pipe = SimpleNamespace(**{**vars(host.pipe), "unet": unet, "vae_scale_factor": 8})
        found.append(host.errors(latents, *about))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], found[2], atol=1e-4, rtol=1e-4)
    assert (found[0] - plain[0]).abs().max() > 1e-2


@every_kind
def test_each_prompt_may_have_an_embedding_of_its_own(pair, kind):
    w = pair(kind)
    prompts, r = [f"a photo of a {MIMI}, red", f"{MIMI} in the snow"], torch.Generator().manual_seed(2)
    for host in w.comfy(), w.diffusers():
        with host.training(torch.zeros(1, w.pipe.unet.config.in_channels, 8, 8)), torch.no_grad():
            own = {name: v + 0.1 * torch.randn(2, len(v), generator=r) for name, v in host.embedding(w.cat).items()}
            x, at = host.encode(prompts, MIMI, own)
            for k, prompt in enumerate(prompts):
                alone, place = host.encode([prompt], MIMI, {name: v[k] for name, v in own.items()})
                torch.testing.assert_close(x[k : k + 1], alone, atol=1e-5, rtol=1e-5)
                assert at[k] == place


@every_kind
def test_facts_embeddings_and_encodings_agree(pair, kind):
    w = pair(kind)
    a, b = w.comfy(), w.diffusers()
    assert (a.base, a.prediction) == (b.base, b.prediction) and a.ids == b.ids
    here, there = a.embedding(w.cat), b.embedding(w.cat)
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    vectors, slopes = w.concepts[0].embedding, []
    for host in a, b:
        with host.training(torch.zeros(1, w.pipe.unet.config.in_channels, 8, 8)):
            leaves = {name: v.clone().requires_grad_() for name, v in vectors.items()}
            x, at = host.encode([f"a photo of a {MIMI}, red", f"{MIMI} in the snow"], MIMI, leaves)
            weigh = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            slopes.append((x.detach(), at, torch.autograd.grad((x * weigh).sum(), list(leaves.values()))))
    for here, there in zip(*((x, at, *slope) for x, at, slope in slopes)):
        torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


@every_kind
def test_a_prompt_too_long_is_cut_at_the_same_token(pair, kind):
    w = pair(kind)
    long = "a red tree in the snow, " * 20
    here, _ = host_comfy.encode_chunks(w.clip.encode_from_tokens, [w.clip.tokenize(long)])
    torch.testing.assert_close(here, hd.encode_prompts(w.pipe, [long])[0], atol=1e-4, rtol=1e-4)


@every_kind
def test_the_errors_agree(pair, kind):
    w = pair(kind)
    times = torch.tensor([0.003, 0.1234, 0.5, 0.77777, 0.999])
    latents, noise = draw(w, len(times))
    context, _ = hd.encode_prompts(w.pipe, [f"a photo of a {w.cat}"])
    found = []
    for host in w.comfy(), w.diffusers():
        with host.training(latents[:1]), torch.no_grad():
            found.append(torch.cat([host.errors(latents[k : k + 1], noise[k : k + 1], times[k : k + 1], context,
                                                f"a photo of a {w.cat}") for k in range(len(times))]))
            if w.kind == "sdxl":
                other = host.errors(latents[:1], noise[:1], times[:1], context, "snow")
                assert not torch.allclose(other, found[-1][:1], rtol=1e-3)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def predictions(w, concepts, sigma=2.5):
    """What each host's model answers (b, c, h, w), in x0, where a batch of prompts meets the same noise."""
    prompts = [p.format(mimi=MIMI if concepts else w.cat, rex=REX if len(concepts) > 1 else OTHER) for p in PROMPTS]
    latents, noise = draw(w, len(prompts))
    x, model, clip = latents + sigma * noise, w.model, w.clip
    for concept in concepts:
        model, clip = applying.apply(model, clip, concept)
    answers = []
    for k, prompt in enumerate(prompts):
        (context, rest), = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        marks = {name: c.cond for name, c in rest.get("model_conds", {}).items() if name.startswith("perfusion_")}
        conds = w.model.model.extra_conds(cross_attn=context, pooled_output=rest["pooled_output"], noise=x[k : k + 1],
                                          device="cpu", width=64, height=64, prompt_type="positive")
        conds = {name: c.process_cond(batch_size=1, area=None, device="cpu").cond for name, c in conds.items()}
        answers.append(w.model.model.apply_model(
            x[k : k + 1], torch.tensor([sigma]), transformer_options={"wrappers": model.wrappers},
            **conds | {"c_crossattn": context} | marks))
    comfy_says = torch.cat(answers)
    sampling = w.model.get_model_object("model_sampling")
    context, present = hd.encode_prompts(w.pipe, prompts, concepts)
    words = hd.words_of(w.pipe, concepts)
    more = hd.added(hd.pooled(hd.encoders(w.pipe), prompts, words), 64, 64) if w.kind == "sdxl" else {}
    texts = texts_of(hd.encoders(w.pipe), prompts, concepts, words, context)
    with torch.no_grad(), acting(w.pipe.unet, hd.projections(w.pipe.unet), concepts, present, texts, 999):
        found = w.pipe.unet(x / (1 + sigma**2) ** 0.5, sampling.timestep(torch.tensor(sigma)), context,
                            added_cond_kwargs=more).sample
    if w.pipe.scheduler.config.prediction_type == "epsilon":
        return comfy_says, x - sigma * found
    return comfy_says, x / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * found


@every_kind
@pytest.mark.parametrize("how", ["plain", "one", "two", "one of two off"])
def test_the_predictions_agree(pair, kind, how):
    w = pair(kind)
    mimi, rex = w.concepts
    concepts = {"plain": (), "one": (mimi,), "two": (mimi, rex), "one of two off": (mimi, rex.at(0))}[how]
    with torch.inference_mode():
        here, there = predictions(w, concepts)
        plain, _ = predictions(w, ())
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    if concepts:
        assert (here - plain).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-2  # the edit is well above what they differ by
        assert torch.equal(here[1], plain[1]) and torch.equal(here[3], plain[3])


@every_kind
@pytest.mark.parametrize("sigma, act", [(0.5, (False, True)), (2.5, (True, True)), (9.0, (True, False))])
def test_the_predictions_agree_where_concepts_act_for_a_part_of_the_sampling(pair, kind, sigma, act):
    w = pair(kind)
    mimi, rex = (c.replace(acting=Acting(*times)) for c, times in zip(w.concepts, ((0.0, 0.7), (0.3, 1.0))))
    with torch.inference_mode():
        here, there = predictions(w, (mimi, rex), sigma)
        if not all(act):
            on = [c if acts else c.at(0) for c, acts in zip(w.concepts, act)]
            torch.testing.assert_close(here, predictions(w, on, sigma)[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


@every_kind
@pytest.mark.parametrize("locks", [("global", "local"), ("global", "global")])
def test_the_predictions_agree_under_a_global_lock(pair, kind, locks):
    w = pair(kind)
    concepts = [c.replace(acting=Acting(lock=lock)) for c, lock in zip(w.concepts, locks)]
    with torch.inference_mode():
        here, there = predictions(w, concepts)
        local, _ = predictions(w, w.concepts)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    assert (here - local).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3
    assert torch.equal(here[1], local[1]) and torch.equal(here[3], local[3])


@every_kind
def test_a_global_locks_keys_are_those_of_the_superclass_prompt_to_the_bit(pair, kind):
    w = pair(kind)
    mimi = w.concepts[0].replace(acting=Acting(lock="global"))
    context, at = hd.encode_prompts(w.pipe, [f"a red {MIMI} in the snow"], [mimi])
    plain, _ = hd.encode_prompts(w.pipe, [f"a red {w.cat} in the snow"])
    texts = texts_of(hd.encoders(w.pipe), [f"a red {MIMI} in the snow"], [mimi], hd.words_of(w.pipe, [mimi]), context)
    edit = JointEdit((mimi,))(at.amax(1), [MIMI], texts)
    layers = hd.projections(w.pipe.unet)
    keys = {name: module for name, module in layers.items() if name.endswith("to_k")}
    with torch.no_grad():
        expected = [module(plain) for module in keys.values()]
        with edited(layers, edit):
            assert all(torch.equal(module(context), e) for module, e in zip(keys.values(), expected))
    assert torch.equal(edit(context)[1], JointEdit(w.concepts[:1])(at.amax(1))(context)[1])  # values read what they did


@every_kind
@pytest.mark.parametrize("locks", [("local", "local"), ("local", "global")])
def test_the_predictions_agree_where_concepts_act_in_regions(pair, kind, locks):
    w, left, soft = pair(kind), torch.zeros(1, 16, 16), torch.linspace(0, 1, 64).expand(1, 32, 64)
    left[..., :9] = 1  # these overlap, so that there are four sets
    concepts = [c.replace(acting=Acting(lock=lock, region=region))
                for c, lock, region in zip(w.concepts, locks, (left, soft))]
    with torch.inference_mode():
        here, there = predictions(w, concepts)
        everywhere, _ = predictions(w, w.concepts)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    assert (here - everywhere).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3
    assert torch.equal(here[1], everywhere[1]) and torch.equal(here[3], everywhere[3])


@every_kind
def test_the_predictions_agree_where_concepts_are_kept_apart(pair, kind):
    w = pair(kind)
    with torch.inference_mode():
        here, there = predictions(w, [c.kept_apart(True) for c in w.concepts])
        joint, _ = predictions(w, w.concepts)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    assert (here - joint).abs().amax((1, 2, 3))[[0, 2]].max() > 1e-3
    assert torch.equal(here[1], joint[1]) and torch.equal(here[3], joint[3])


@every_kind
def test_the_covariance_is_the_same_by_its_hash_and_to_the_digits(pair, kind, tmp_path):
    w = pair(kind)
    lines = (w.folder / "captions.txt").read_text(encoding="utf-8")
    found = []
    for make, name in (w.comfy, "comfy"), (w.diffusers, "diffusers"):
        folder = w.folder if kind == "creature" else tmp_path / name  # the demo keeps its own
        folder.mkdir(exist_ok=True)
        (folder / "captions.txt").write_text(lines, encoding="utf-8")
        for kept in (folder / "covariance").glob("*"):
            kept.unlink()
        found.append(make(folder).inverse_covariance())
    (here, hash_here, facts_here), (there, hash_there, facts_there) = found
    assert hash_here == hash_there and facts_here == facts_there
    assert w.concepts[0].covariance == hash_here
    assert (here - there).norm() < 1e-3 * there.norm()


@every_kind
def test_the_same_tune_learns_the_same_concept_in_both(pair, kind):
    w = pair(kind)
    learnt = []
    for host in w.comfy(w.folder), w.diffusers(w.folder):
        host.latents = lambda images: torch.randn(1, w.pipe.unet.config.in_channels, 8, 8,
                                                  generator=torch.Generator().manual_seed(3))
        learnt.append(tune(host, PICTURE[:1], w.cat, MIMI, TUNING))
    here, there = learnt
    assert here.training["loss"] == pytest.approx(there.training["loss"], rel=1e-4)
    torch.testing.assert_close(here.target_input, there.target_input, atol=1e-4, rtol=1e-4)
    for name in here.target_output:
        change = (here.target_output[name] - there.target_output[name]).abs()
        assert change.median() < 1e-3, name  # a step of AdamW has the size of its rate, whatever the gradient's
