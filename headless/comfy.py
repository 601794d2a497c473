"""ComfyUI beside the pack: where it is, its modules in this process, and its server with the pack linked.

`python -m headless.comfy` prints where it was found, or nothing.
"""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MISSING = ("ComfyUI was not found at $COMFYUI_PATH, in the pack's own parent, at ~/comfy/ComfyUI or in build/ComfyUI. "
           "Clone it to one of these, or set COMFYUI_PATH.")


def find() -> Path | None:
    """ComfyUI's folder, if it is on this machine."""
    places = os.environ.get("COMFYUI_PATH"), ROOT.parent.parent, Path.home() / "comfy/ComfyUI", ROOT / "build/ComfyUI"
    return next((Path(p) for p in places if p and (Path(p) / "comfy" / "sd.py").exists()), None)


def enter(cpu: bool = False) -> Path | None:
    """Make ComfyUI's modules importable, and the pack's rooms as `perfusion.core`, `perfusion.nodes` and so on.

    The pack's folder may have any name, and its `nodes/` would hide ComfyUI's `nodes.py` if the folder came first on
    the path, so a namespace package of a name of its own stands for it, as ComfyUI gives it one. Returns `find()`.
    """
    pack = sys.modules.setdefault("perfusion", types.ModuleType("perfusion"))
    pack.__path__ = [str(ROOT)]
    comfy = find()
    if comfy:
        sys.path.insert(0, str(comfy))
        import comfy.options
        import utils.install_util  # noqa: F401  before nodes.py puts comfy/, which has another utils, ahead on the path

        comfy.options.enable_args_parsing(False)  # this process's arguments are not ComfyUI's
        from comfy.cli_args import args

        args.use_pytorch_cross_attention = True
        args.cpu = cpu
    return find()


def put(source: Path, target: Path, pattern: str):
    """Copy what is not there yet, so that what was changed there stays."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob(pattern):
        if not (target / path.name).exists():
            shutil.copy(path, target)


def serve(base: Path, port: int, *extra: str) -> subprocess.Popen:
    """Start the server on a folder of its own, with the pack linked into it. Raises ValueError without ComfyUI."""
    comfy = find()
    if not comfy:
        raise ValueError(MISSING)
    for name in ("custom_nodes", "models/checkpoints", "input", "output", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / "perfusion-concepts"
    if not os.path.lexists(link):  # else it is linked already, or is the pack itself
        link.symlink_to(ROOT, target_is_directory=True)
    put(ROOT / "example_workflows", base / "user" / "default" / "workflows", "*.json")
    import torch

    command = [sys.executable, "main.py", "--base-directory", str(base), "--listen", "127.0.0.1", "--port", str(port),
               "--disable-auto-launch", "--use-pytorch-cross-attention", "--database-url", "sqlite:///:memory:",
               *(() if torch.accelerator.is_available() else ("--cpu",)), *extra]
    return subprocess.Popen(command, cwd=comfy)


if __name__ == "__main__":
    print(find() or "")
