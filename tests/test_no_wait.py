"""What a model call costs beside the model: nothing is asked of the device, and the edit is made once."""

import copy
from itertools import product
from types import SimpleNamespace

import comfy.patcher_extension
import pytest
import torch

from perfusion.core import key_lock
from perfusion.core.acting import Acting
from perfusion.core.apart_comfy import NAME
from perfusion.core.apply import ConceptWrapper
from perfusion.core.prompt import PRESENT
from perfusion.core.where import RUN
from perfusion.core.where_comfy import traced

import applied
from applied import apply, encode, sample

pytestmark = pytest.mark.host

inference, world = applied.inference, applied.world  # fixtures
WRAPPER = comfy.patcher_extension.WrappersMP.APPLY_MODEL
LEFT = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], -1)
PROMPT = "a photo of a <mimi> beside a <rex>"
WAYS = {
    "as they come": Acting(), "under a global lock": Acting(lock="global"), "in a region": Acting(region=LEFT),
    "kept apart": Acting(apart=True),
}


def on(device, value):
    """A value of a call with its tensors on another device, in dicts and lists too."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, dict):
        return {name: on(device, inner) for name, inner in value.items()}
    return [on(device, inner) for inner in value] if isinstance(value, list) else value


def calls_of(model, positive, negative):
    """The arguments of every model call of a run, as the host gives them."""
    heard, spy = [], model.clone()

    def hear(executor, *args, **kwargs):
        heard.append((args, kwargs))
        return executor(*args, **kwargs)

    inner = spy.wrappers[WRAPPER]
    spy.wrappers[WRAPPER] = {"before": [hear], **inner}
    sample(spy, positive, negative)
    return heard


@pytest.mark.parametrize("kind", ("sd1", "sdxl"))
@pytest.mark.parametrize("way", WAYS)
def test_a_model_call_asks_nothing_of_the_device_and_makes_each_edit_once(world, kind, way, monkeypatch):
    """On the device that holds no numbers, where every question for one is an error: the first call of a run and a
    later one, watched by Trace Concepts and not."""
    w, made, plain = world(kind), [], key_lock.Edit.__call__
    model, clip = apply(w, *(concept.replace(acting=WAYS[way]) for concept in (w.cat, w.dog)))
    model = traced(model)[0]
    calls = calls_of(model, encode(clip, PROMPT), encode(clip, "blurry"))
    unet = copy.deepcopy(model.model.diffusion_model).to("meta")
    wrapper = next(w for w in model.get_wrappers(WRAPPER, "perfusion") if isinstance(w, ConceptWrapper))
    monkeypatch.setattr(key_lock.Edit, "__call__", lambda edit, x: made.append(edit) or plain(edit, x))

    class Executor:
        class_obj = SimpleNamespace(diffusion_model=unet, model_sampling=model.get_model_object("model_sampling"))

        def __call__(self, x, t, concat, context, control, options, **more):
            return unet(x, t, context, control=control, transformer_options=options, **more)

    for first, watched in product((True, False), (True, False)):
        (x, t, concat, context, control, options), kwargs = calls[0 if first else -1]
        options = {name: value for name, value in options.items() if watched or name != RUN}
        if NAME in options:
            options[NAME].read = {} if first else on("meta", options[NAME].read)
        if watched:
            options[RUN].sums = {}
        marks = {name: value if name == PRESENT else on("meta", value) for name, value in kwargs.items()}
        answer = wrapper(Executor(), *on("meta", [x, t]), concat, on("meta", context), control, options, **marks)
        assert answer.device.type == "meta" and answer.shape == x.shape
        assert made and len({id(edit) for edit in made}) == len(made)
        made.clear()
