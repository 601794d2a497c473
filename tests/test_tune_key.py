"""The key under which a Quick Tune's result is found again."""

import comfy.model_management as memory
import pytest
import torch

from perfusion.core import host_comfy

import tuning
from tuning import CAT, PICTURE, host_over, learn, patched, v_prediction

pytestmark = pytest.mark.host

folder, prompt = tuning.folder, tuning.prompt  # fixtures


def test_the_key_is_the_same_for_the_same_inputs_and_for_no_others(tiny):
    model, clip, vae = tiny("sd1")
    key = host_comfy.tune_key(model, clip, vae, PICTURE, CAT, 0)
    assert key == host_comfy.tune_key(*tiny("sd1"), PICTURE.clone(), CAT, 0)
    keys = [key, host_comfy.tune_key(model, clip, vae, PICTURE, CAT, 1)]
    keys += [host_comfy.tune_key(model, clip, vae, PICTURE, "dog", 0)]
    keys += [host_comfy.tune_key(*patched(model, clip, strength=s), vae, PICTURE, CAT, 0) for s in (0.5, 1.0)]
    keys += [host_comfy.tune_key(*patched(model, clip, seed=2), vae, PICTURE, CAT, 0)]
    skipping = clip.clone()
    skipping.clip_layer(-2)
    keys += [host_comfy.tune_key(model, skipping, vae, PICTURE, CAT, 0)]
    for kind in ("EPS", "V_PREDICTION"):
        keys += [host_comfy.tune_key(v_prediction(model, kind), clip, vae, PICTURE, CAT, 0)]
    for part in range(3):
        changed = tiny("sd1")
        root = (changed[0].model, changed[1].cond_stage_model, changed[2].first_stage_model)[part]
        max(root.parameters(), key=torch.numel).data.mul_(1.01)
        keys += [host_comfy.tune_key(*changed, PICTURE, CAT, 0)]
    assert len(set(keys)) == len(keys) and None not in keys


def test_one_pixel_of_a_picture_or_of_a_mask_changes_the_key(tiny):
    parts = tiny("sd1")
    picture, mask = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 512, 512)
    keys = {host_comfy.tune_key(*parts, picture, mask)}
    for tensor in (picture, mask):
        tensor[0, 101, 333] = 0.5
        keys.add(host_comfy.tune_key(*parts, picture, mask))
    assert len(keys) == 3


@pytest.mark.parametrize("lora", (False, True))
def test_the_key_does_not_see_what_is_loaded(tiny, folder, lora):
    model, clip, vae = tiny("sd1")
    model, clip = patched(model, clip) if lora else (model, clip)
    key = host_comfy.tune_key(model, clip, vae)
    learn(host_over(model, clip, vae, folder))
    assert host_comfy.tune_key(model, clip, vae) == key
    memory.load_models_gpu([model, clip.patcher], force_full_load=True)
    assert host_comfy.tune_key(model, clip, vae) == key == host_comfy.tune_key(model.clone(), clip.clone(), vae)
    memory.unload_all_models()
    assert host_comfy.tune_key(model, clip, vae) == key


def test_what_cannot_be_hashed_has_no_key(tiny):
    model, clip, vae = tiny("sd1")
    foreign = model.clone()
    foreign.add_object_patch("diffusion_model.out", torch.nn.Identity())
    assert host_comfy.tune_key(foreign, clip, vae) is None
    wrapped = model.clone()
    wrapped.add_wrapper_with_key("apply_model", "other", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    assert host_comfy.tune_key(wrapped, clip, vae) is None
    weighed, spoken = model.clone(), clip.clone()
    weighed.add_weight_wrapper("diffusion_model.out.2.weight", torch.nn.Identity())
    spoken.patcher.set_injections("bypass", [])
    assert host_comfy.tune_key(weighed, clip, vae) is None is host_comfy.tune_key(model, spoken, vae)
