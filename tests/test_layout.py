"""The arrows between the pack's rooms, and the size of its files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for room in ("core", "nodes", "headless") for path in (ROOT / room).rglob("*.py"))
CORE = [path for path in FILES if path.parent.name == "core"]
LONGEST = 400  # lines

# files of core that may import ComfyUI's library
COMFY = {"host_comfy", "prompt", "apply", "demo_comfy", "doctor_comfy", "where_comfy", "host_versions",
         "fidelity_comfy"}
UPON = {"quick_tune", "domain_comfy", "sweep"}  # what stands upon these, for ComfyUI's nodes
# files of core that import torch only, never each other; `swap` is how two of them get at a module
ALONE = {"key_lock", "weight_offset", "encoder", "public_encoder", "openclip", "swap"}
SERVER = {"folder_paths", "server", "comfy_api", "comfy_execution", "execution", "comfy_extras", "nodes"}
ROOMS = {"core", "nodes", "headless", "bench", "demo", "web", "tests"}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
every_core_file = pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)


def imports(path):
    """What a file imports anywhere in it, in dotted names: `core.tune` for a room of the pack, `torch` for others."""
    here, found = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            # of a room, each name is a file; of a library, each name is one thing in it
            rooms = len(base) == 1 and base[0] in ROOMS or not base
            found |= {".".join([*base, alias.name]) for alias in node.names} if rooms else {".".join(base)}
    return found


def tops(path):
    return {name.split(".")[0] for name in imports(path)}


def test_there_is_something_to_look_at():
    assert {"tune", "host_comfy", "key_lock", "concept"} <= {path.stem for path in CORE}
    assert "core.key_lock" in imports(ROOT / "core" / "tune.py") and "torch" in imports(ROOT / "core" / "tune.py")
    assert "core.quick_tune" in imports(ROOT / "nodes" / "learn.py")
    assert "comfy.model_management" in imports(ROOT / "core" / "host_comfy.py")


@every_core_file
def test_core_imports_no_other_room_and_no_server(path):
    assert not tops(path) & (SERVER | ROOMS - {"core"})


@every_core_file
def test_only_these_files_of_core_import_comfy_and_diffusers(path):
    assert "comfy" not in tops(path) or path.stem in COMFY
    libraries = {"diffusers", "transformers", "accelerate"} - ({"transformers"} if path.stem == "demo_comfy" else set())
    assert not tops(path) & libraries or path.stem == "host_diffusers"


@pytest.mark.parametrize("path", [path for path in CORE if path.stem in ALONE], ids=lambda path: path.stem)
def test_the_mathematics_import_torch_only(path):
    assert not {name for name in imports(path) if name.startswith("core")} - {"core.swap"} and "torch" in tops(path)


@every_core_file
def test_what_comfy_needs_is_needed_by_nothing_else_in_core(path):
    hosts = {f"core.{name}" for name in (*COMFY, "host_diffusers")}
    assert path.stem in COMFY | UPON or not imports(path) & hosts


def test_no_file_of_core_needs_itself_through_others():
    needs = {path.stem: {n.split(".")[1] for n in imports(path) if n.startswith("core.")} for path in CORE}

    def reach(name, above=()):
        assert name not in above, " -> ".join((*above, name))
        for other in needs.get(name, ()):
            reach(other, (*above, name))

    for name in needs:
        reach(name)


@every_file
def test_nodes_need_core_alone_and_headless_needs_no_nodes(path):
    room = path.relative_to(ROOT).parts[0]
    assert not tops(path) & (ROOMS - {"core", room})


@every_file
def test_files_are_short_and_have_a_subject(path):
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST
