"""What the declarations share: the pack's socket types and its category."""

from comfy_api.latest import io

Concept = io.Custom("PERFUSION_CONCEPT")
Domain = io.Custom("PERFUSION_DOMAIN")
Trace = io.Custom("PERFUSION_TRACE")
CATEGORY = "perfusion"
