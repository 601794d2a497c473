"""The declarations: what an artist's workflow file depends on, and what the host sees of the pack."""

import inspect
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host
ROOT = Path(__file__).parent.parent

# Frozen from their first landing: ids, and inputs in their order. Only append.
PROMISED = {
    "PerfusionQuickTune": "model clip vae image superclass word steps seed resolution batch mirror "
                         "mask captions concept preview_every",
    "PerfusionSaveConcept": "concept name cover precision",
    "PerfusionLoadConcept": "concept_name embedded sha256",
    "PerfusionGateStrength": "concept strength bias_mode bias temperature start_percent end_percent lock region",
    "PerfusionApplyConcept": "model clip concept edit_negative keep_apart",
    "PerfusionDemoModel": "",
    "PerfusionDemoPicture": "picture",
    "PerfusionLoadDomain": "domain_name",
    "PerfusionEncodeConcept": "domain model clip vae clip_vision image superclass word mask",
    "PerfusionTrainDomain": "model clip vae clip_vision images superclass name steps seed resolution batch",
    "PerfusionGateSweep": "model clip concept strengths concept_b strengths_b",
    "PerfusionFidelityCurve": "model clip vae clip_vision concept image strengths prompts seed resolution",
    "PerfusionTrace": "model",
    "PerfusionWhere": "trace samples image",
    "PerfusionConceptDoctor": "model clip concept domain",
}
OUTPUTS = {
    "PerfusionQuickTune": ["PERFUSION_CONCEPT"],
    "PerfusionSaveConcept": [],
    "PerfusionLoadConcept": ["PERFUSION_CONCEPT", "STRING"],
    "PerfusionGateStrength": ["PERFUSION_CONCEPT"],
    "PerfusionApplyConcept": ["MODEL", "CLIP"],
    "PerfusionDemoModel": ["MODEL", "CLIP", "VAE", "CLIP_VISION"],
    "PerfusionDemoPicture": ["IMAGE"],
    "PerfusionLoadDomain": ["PERFUSION_DOMAIN"],
    "PerfusionEncodeConcept": ["PERFUSION_CONCEPT"],
    "PerfusionTrainDomain": ["PERFUSION_DOMAIN"],
    "PerfusionGateSweep": ["MODEL", "CLIP", "STRING"],
    "PerfusionFidelityCurve": ["PERFUSION_CONCEPT", "IMAGE"],
    "PerfusionTrace": ["MODEL", "PERFUSION_TRACE"],
    "PerfusionWhere": ["IMAGE"],
    "PerfusionConceptDoctor": ["STRING"],
}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def test_ids_and_the_order_of_inputs_are_those_that_saved_workflows_hold(pack):
    assert set(pack) == set(PROMISED)
    for name, node in pack.items():
        schema = node.define_schema()
        assert [i.id for i in schema.inputs][: len(PROMISED[name].split())] == PROMISED[name].split()
        assert [o.io_type for o in schema.outputs] == OUTPUTS[name]


def test_every_input_and_output_has_a_tooltip_and_no_node_shows_more_than_eight_widgets(pack):
    for node in pack.values():
        schema = node.define_schema()
        assert all(x.tooltip for x in [*schema.inputs, *schema.outputs]), schema.node_id
        widgets = [i for i in schema.inputs if i.io_type in WIDGETS and not getattr(i, "force_input", None)
                   and not getattr(i, "advanced", None)]
        assert len(widgets) <= 8, schema.node_id


def test_what_the_host_asks_of_a_node_is_answered(pack):
    for node in pack.values():
        info = node.GET_NODE_INFO_V1()
        json.dumps(info)
        assert info["category"] == "perfusion" and info["description"]


def test_execute_takes_exactly_the_inputs_that_are_declared(pack):
    for name, node in pack.items():
        assert list(inspect.signature(node.execute).parameters) == PROMISED[name].split()


def test_importing_the_pack_changes_nothing_in_the_host():
    code = f"""
import sys, importlib.util
sys.path.insert(0, {str(ROOT)!r})
from headless.comfy import enter
comfy = enter(cpu=True)
sys.path.remove({str(ROOT)!r})
import comfy.sd, comfy.samplers, comfy.model_patcher, comfy.ldm.modules.attention, folder_paths, nodes, server
def state():
    host = "comfy", "folder_paths", "nodes", "server"
    watched = {{n: m for n, m in sys.modules.items() if n.split(".")[0] in host}}
    found = {{}}
    for n, m in watched.items():
        for k, v in vars(m).items():
            found[n, k] = id(v)
            if isinstance(v, type) and v.__module__ == n:
                found |= {{(n, k, a): id(b) for a, b in vars(v).items()}}
    folders = {{k: (tuple(v[0]), tuple(sorted(v[1]))) for k, v in folder_paths.folder_names_and_paths.items()}}
    return watched.keys(), found, folders
names, before, folders = state()
spec = importlib.util.spec_from_file_location("custom_nodes.pack", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["custom_nodes.pack"] = module
spec.loader.exec_module(module)
assert callable(module.comfy_entrypoint) and module.WEB_DIRECTORY == "./web"
_, after, folders_after = state()
changed = [k for k in before if after.get(k) != before[k] and not k[1].startswith("__")]
assert not changed, changed
assert folders == folders_after
print("unchanged", len(before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "unchanged" in done.stdout, done.stderr


def test_installing_the_requirements_into_comfyuis_environment_changes_no_package():
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-",
                           "-r", str(ROOT / "requirements.txt")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["install"] == []


def test_all_that_is_required_is_in_comfyuis_own_requirements():
    import re

    from perfusion.headless.comfy import find

    def names(path):
        lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
        return {re.match(r"[\w-]+", line)[0].lower() for line in lines if line}

    ours = names(ROOT / "requirements.txt")
    assert ours == {"torch", "safetensors", "einops", "transformers", "numpy"}
    assert ours <= names(find() / "requirements.txt")


def test_a_models_folder_that_cannot_be_written_does_not_keep_the_pack_from_loading(pack, tmp_path):
    import folder_paths

    from perfusion.nodes import folders

    (tmp_path / "models").write_text("a file, where a folder cannot be made")
    before = folder_paths.models_dir
    folder_paths.models_dir = str(tmp_path / "models")
    try:
        folders.register()
        assert folders.names() == folders.names()
    finally:
        folder_paths.models_dir = before


def test_the_pack_imports_only_what_requirements_and_the_host_name():
    import ast

    named = {line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()} - {""}
    host = {"comfy", "comfy_api", "comfy_execution", "comfyui_version", "folder_paths", "server"}
    host |= {"aiohttp", "PIL"}  # these are in ComfyUI's requirements
    loaded = set((ROOT / "core").glob("*.py")) - {ROOT / "core" / "host_diffusers.py"}  # for machines without ComfyUI
    for path in [*loaded, *(ROOT / "nodes").glob("*.py"), ROOT / "__init__.py"]:
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in statement.names] if isinstance(statement, ast.Import) else \
                [statement.module] if isinstance(statement, ast.ImportFrom) and not statement.level else []
            for name in names:
                root = name.split(".")[0]
                assert root in named | host | set(sys.stdlib_module_names), f"{path.name} imports {name}"


def test_a_saved_concept_is_in_the_list_at_once_and_loads_back(pack, concept):
    from perfusion.nodes import folders

    def listed():
        schema = pack["PerfusionLoadConcept"].define_schema()
        return schema.inputs[0].options

    assert "kitty.safetensors" not in listed()
    path = folders.save(concept, "kitty")
    assert path.parent.name == "perfusion" and "kitty.safetensors" in listed()
    load = pack["PerfusionLoadConcept"]
    assert load.validate_inputs(concept_name="kitty.safetensors") is True
    loaded, word = load.execute("kitty.safetensors").result
    assert word == concept.word and loaded.superclass == concept.superclass
    assert "models/perfusion/concepts" in load.validate_inputs(concept_name="gone.safetensors")


def test_saving_never_replaces_another_concept_and_the_same_one_keeps_its_name(pack, concept):
    from perfusion.nodes import folders

    first = folders.save(concept, "mimi")
    assert folders.save(concept, "mimi.safetensors") == first
    second = folders.save(concept.replace(strength=0.9), "mimi")
    assert second.name == "mimi-2.safetensors" and first.exists()
    assert folders.save(concept, "../../outside").parent == first.parent


def test_a_name_that_a_models_folder_has_already_is_not_given_to_another_concept(pack, concept):
    from perfusion.core.concept import dump
    from perfusion.nodes import folders

    there = folders.models() / "concepts" / "taken.safetensors"
    there.parent.mkdir(parents=True)
    there.write_bytes(dump(concept))
    assert folders.save(concept, "taken") == there  # it is there, and the list gives that one
    other = folders.save(concept.replace(strength=0.9), "taken")
    assert other.name == "taken-2.safetensors" and folders.find(other.name) == other


def test_a_concept_that_travels_in_the_workflow_needs_no_file(pack, concept):
    import base64
    import hashlib

    from perfusion.core.concept import dump

    data = dump(concept)
    text, digest = base64.b64encode(data).decode(), hashlib.sha256(data).hexdigest()
    load = pack["PerfusionLoadConcept"]
    assert load.validate_inputs(concept_name="nowhere.safetensors", embedded=text) is True
    assert load.execute("nowhere.safetensors", text, digest).result[1] == concept.word
    with pytest.raises(ValueError, match="hash"):
        load.execute("nowhere.safetensors", text, "0" * 64)
    for broken in ("%%%", text[:100], base64.b64encode(b"x" * 50).decode()):
        with pytest.raises(ValueError, match="workflow"):
            load.execute("nowhere.safetensors", broken, "")


def test_a_file_of_the_right_name_and_another_content_is_refused_with_both_hashes(pack, concept):
    from perfusion.nodes import folders

    folders.save(concept, "named")
    with pytest.raises(ValueError, match="named.safetensors.*hash 000000000000"):
        pack["PerfusionLoadConcept"].execute("named.safetensors", "", "0" * 64)


def test_the_slider_runs_linearly_over_the_published_range_and_raw_bias_is_exact(pack, concept):
    gate = pack["PerfusionGateStrength"].execute
    at = [gate(concept, s, "slider", 9.0, 9.0).result[0] for s in (0, 0.01, 0.5, 1)]
    assert at[0].off and not at[1].off
    assert [(c.gate_bias, c.scale) for c in at[1:]] == [(0.30, 0.01), (0.30, 0.5), (0.30, 1.0)]
    assert {c.temperature for c in at} == {0.10}
    raw = gate(concept, 0.0, "raw", 0.62, 0.08).result[0]
    assert (raw.gate_bias, raw.temperature, raw.off) == (0.62, 0.08, False)
    assert concept.strength == 0.75 and concept.bias is None


def test_gate_strength_says_when_and_where_and_the_file_does_not(pack, concept):
    import torch

    from perfusion.core.concept import dump

    gate = pack["PerfusionGateStrength"].execute
    old = gate(concept, 0.7, "slider", 0.7, 0.1).result[0]  # as a prompt from before these inputs has it
    assert (old.acting.start, old.acting.end, old.acting.lock, old.acting.region) == (0, 1, "local", None)
    new = gate(concept, 0.7, "slider", 0.7, 0.1, 0.2, 0.8, "global", torch.ones(8, 6)).result[0]
    assert (new.acting.start, new.acting.end, new.acting.lock) == (0.2, 0.8, "global")
    assert new.acting.region.shape == (1, 8, 6)
    assert dump(new) == dump(old)


def test_a_cover_is_small_and_stays_out_of_the_way(pack, concept):
    import torch

    from perfusion.core.concept import dump, parse
    from perfusion.nodes.watch import jpeg

    cover = jpeg(torch.rand(1, 900, 700, 3))
    with_cover = dump(concept.replace(cover=cover))
    assert len(with_cover) < len(dump(concept)) + 80_000
    assert parse(with_cover, "x").cover == cover


def test_options_that_an_older_host_does_not_know_are_left_out():
    from perfusion.core.host_versions import known

    class Old:
        def __init__(self, id, tooltip=None): ...

    assert known(Old, tooltip="a", advanced=True) == {"tooltip": "a"}


@pytest.fixture
def concept():
    import torch

    from perfusion.core.concept import Concept

    i = torch.arange(1.0, 9.0)
    return Concept(base="sd1", superclass="cat", word="<mimi>", embedding={"clip_l": torch.ones(8)}, target_input=i,
                   key_input=i, direction=i / (i @ i), energy=float(i @ i), covariance="abc",
                   target_output={"a.attn2.to_v": torch.ones(4)})


def test_the_door_opens_to_nothing_where_it_is_run_outside_of_a_package():
    assert "comfy_entrypoint" not in runpy.run_path(str(ROOT / "__init__.py"))  # as pytest or an indexer meets it
