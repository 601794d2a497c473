"""The door: ComfyUI finds the nodes and the web folder here. Importing it changes nothing in the host."""

if __package__:  # pytest collects this file as a lone module
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
