"""Tests import the pack as `perfusion.core` and `perfusion.nodes`, with ComfyUI beside it where it is found."""

import importlib
import importlib.util
import json
import warnings
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tuning")  # its asserts are to tell as much as a test's own

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("comfy_beside", HERE.parent / "headless" / "comfy.py")
beside = importlib.util.module_from_spec(spec)
spec.loader.exec_module(beside)

COMFY = beside.enter(cpu=True)
HOSTS = HERE.parent / "bench" / "results" / "hosts.json"
collect_ignore = []
if not COMFY:
    collect_ignore = [str(p.relative_to(HERE)) for p in HERE.rglob("test_*.py")
                      if "pytest.mark.host" in p.read_text(encoding="utf-8")]
    warnings.warn(f"EVERY TEST AGAINST THE REAL HOST IS SKIPPED: {beside.MISSING}", stacklevel=1)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """What a whole `make test-hosts` ran on this version of ComfyUI."""
    if not config.option.markexpr.startswith("host ") or config.args != ["tests"]:
        return
    from comfyui_version import __version__

    counts = {kind: len(terminalreporter.stats.get(kind, ())) for kind in ("passed", "failed", "error", "skipped")}
    held = json.loads(HOSTS.read_text(encoding="utf-8")) if HOSTS.exists() else {}
    HOSTS.write_text(json.dumps(held | {__version__: counts}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Loads a tiny random checkpoint of a kind (see checkpoints.py) anew, as the stock loader does."""
    import checkpoints

    folder = tmp_path_factory.mktemp("tiny")

    def load(kind):
        checkpoints.register()
        path = folder / f"{kind}.safetensors"
        if not path.exists():
            checkpoints.save_tiny(kind, path)
        return checkpoints.load(path)

    yield load
    checkpoints.unregister()


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """The pack's nodes by id, its folders in a place of their own."""
    import asyncio

    import folder_paths
    from server import PromptServer

    base = tmp_path_factory.mktemp("base")
    loop = asyncio.new_event_loop()
    PromptServer(loop)  # not started; it is where the pack adds its routes
    before = folder_paths.models_dir, folder_paths.get_output_directory()
    folder_paths.models_dir = str(base / "models")
    folder_paths.set_output_directory(str(base / "output"))
    from perfusion.nodes import comfy_entrypoint

    async def nodes():
        return await (await comfy_entrypoint()).get_node_list()

    yield {node.define_schema().node_id: node for node in asyncio.run(nodes())}
    loop.close()
    del PromptServer.instance
    folder_paths.models_dir = before[0]
    folder_paths.set_output_directory(before[1])
    for name in "perfusion", "perfusion_domains":
        del folder_paths.folder_names_and_paths[name]


@pytest.fixture(scope="session")
def main():
    """`python -m headless` without a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE.parent))  # for no longer than this: `nodes` is ComfyUI's to others
        return importlib.import_module("headless.__main__").main


@pytest.fixture(scope="session")
def miniature():
    """Writes a random miniature of Stable Diffusion and captions of its world into a folder, and returns that."""
    import torch

    from perfusion.bench import mini_models, mini_tower

    def write(folder, captions, scaling_factor=0.7):
        torch.manual_seed(0)
        networks = mini_models.build()
        for p in (p for network in networks.values() for p in network.parameters() if p.ndim == 1):
            p.data += 0.1 * torch.randn_like(p)  # fresh norms are all alike, and answers that sum to 0 span no space
        mini_models.save(folder, **networks, scaling_factor=scaling_factor)
        mini_tower.build().half().save_pretrained(folder / "vision")
        (folder / "captions.txt").write_text("\n".join(captions), encoding="utf-8")
        return folder

    return write
