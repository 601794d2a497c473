"""What the declarations share: the pack's socket types, and one guard for hosts that are older than an option."""

import inspect

from comfy_api.latest import io

Concept = io.Custom("PERFUSION_CONCEPT")
Domain = io.Custom("PERFUSION_DOMAIN")
Trace = io.Custom("PERFUSION_TRACE")
CATEGORY = "perfusion"


def known(cls, **options) -> dict:
    """The options that this host's version of an input or a schema knows; v0.3.64 has no `advanced`, for one."""
    names = inspect.signature(cls.__init__).parameters
    return {name: value for name, value in options.items() if name in names}
