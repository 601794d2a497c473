"""What differs between versions of ComfyUI, from v0.3.64 on: each choice that is made for that is in this file."""

import inspect

import comfy.model_patcher


def known(cls, **options) -> dict:
    """The options that this version of a class of the host knows; v0.3.64 has no `advanced` on a widget, for one."""
    names = inspect.signature(cls.__init__).parameters
    return {name: value for name, value in options.items() if name in names}


def is_dynamic(patcher) -> bool:
    """Whether a patcher streams its weights; v0.3.64 and v0.8.0 have none that does."""
    return getattr(patcher, "is_dynamic", bool)()


def new_patcher(model, device, offload, disable_dynamic: bool):
    """A patcher of the kind that the host's loaders make; v0.3.64 has one kind."""
    plain = comfy.model_patcher.ModelPatcher
    kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    return kind(model, load_device=device, offload_device=offload)
