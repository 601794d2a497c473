"""The pack in ComfyUI's real server: the artist's first graph, a re-queue, a cancel, and a mistake."""

import time
from pathlib import Path

import pytest

from served import serving

pytestmark = pytest.mark.host
HERE = Path(__file__).parent
REGISTER = """import sys
sys.path.append({here!r})
import checkpoints
checkpoints.register()
NODE_CLASS_MAPPINGS = {{}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from PIL import Image
    from skimage import data

    import checkpoints

    base = tmp_path_factory.mktemp("server")
    (base / "custom_nodes" / "tiny").mkdir(parents=True)
    (base / "custom_nodes" / "tiny" / "__init__.py").write_text(REGISTER.format(here=str(HERE)))
    (base / "models" / "checkpoints").mkdir(parents=True)
    checkpoints.register()
    checkpoints.save_tiny("sd1", base / "models" / "checkpoints" / "tiny.safetensors")
    checkpoints.unregister()
    captions = (HERE.parent / "core" / "captions.txt").read_text(encoding="utf-8").splitlines()
    (base / "models" / "perfusion").mkdir()
    (base / "models" / "perfusion" / "captions.txt").write_text("\n".join(captions[:256]), encoding="utf-8")
    (base / "input").mkdir()
    Image.fromarray(data.chelsea()).save(base / "input" / "cat.png")
    with serving(base) as talk:
        yield talk


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(seed=1, steps=4, strength=0.8, text="a photo of <mimi>, in the snow"):
    """Load, tune, save, dial, apply, encode, sample: the stock nodes and ours."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny.safetensors"),
        "2": node("LoadImage", image="cat.png"),
        "3": node("PerfusionQuickTune", model=["1", 0], clip=["1", 1], vae=["1", 2], image=["2", 0], superclass="cat",
                  word="<mimi>", steps=steps, seed=seed, resolution=64, batch=1, mirror=False),
        "4": node("PerfusionSaveConcept", concept=["3", 0], name="mimi", cover=["2", 0]),
        "5": node("PerfusionGateStrength", concept=["3", 0], strength=strength, bias_mode="slider", bias=0.7,
                  temperature=0.15),
        "6": node("PerfusionApplyConcept", model=["1", 0], clip=["1", 1], concept=["5", 0], edit_negative=False),
        "7": node("CLIPTextEncode", clip=["6", 1], text=text),
        "8": node("CLIPTextEncode", clip=["6", 1], text="blurry"),
        "9": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "10": node("KSampler", model=["6", 0], positive=["7", 0], negative=["8", 0], latent_image=["9", 0], seed=7,
                   steps=2, cfg=5, sampler_name="euler", scheduler="normal", denoise=1),
        "11": node("VAEDecode", samples=["10", 0], vae=["1", 2]),
        "12": node("SaveImage", images=["11", 0], filename_prefix="picture"),
    }


def saved_picture(server, outputs):
    from PIL import Image

    name = outputs["12"]["images"][0]["filename"]
    return Image.open(server.base / "output" / name).convert("RGB").tobytes()


def test_one_picture_in_a_concept_out_and_the_concept_in_a_picture(server):
    status, outputs, errors = server.run(graph())
    assert status == "success", errors
    assert outputs["3"]["images"], "the node shows the strip: photo, before, after, loss"
    assert outputs["4"]["text"][0].startswith("Saved mimi.safetensors")
    assert (server.base / "output/perfusion/mimi.safetensors").stat().st_size < 40 * 1024

    # without a restart it is in the loader's list, and applied from the file it gives the same picture
    listed = server.call("/object_info/PerfusionLoadConcept")["PerfusionLoadConcept"]["input"]["required"]
    assert "mimi.safetensors" in (listed["concept_name"][1].get("options") or listed["concept_name"][0])
    from_file = {name: n for name, n in graph().items() if name not in ("2", "3", "4")}
    from_file["3"] = node("PerfusionLoadConcept", concept_name="mimi.safetensors", embedded="", sha256="")
    status, from_outputs, errors = server.run(from_file)
    assert status == "success", errors
    assert saved_picture(server, from_outputs) == saved_picture(server, outputs)


def test_strength_zero_makes_the_picture_of_the_superclass_word(server):
    _, off, errors = server.run(graph(strength=0))
    assert not errors
    plain = {name: n for name, n in graph().items() if name in ("1", "9", "10", "11", "12")}
    plain["7"] = node("CLIPTextEncode", clip=["1", 1], text="a photo of cat, in the snow")
    plain["8"] = node("CLIPTextEncode", clip=["1", 1], text="blurry")
    plain["10"] = node("KSampler", **{**plain["10"]["inputs"], "model": ["1", 0]})
    _, base, errors = server.run(plain)
    assert not errors
    assert saved_picture(server, off) == saved_picture(server, base)


def test_a_sweep_runs_the_sampler_once_for_each_strength_and_the_hosts_grid_takes_the_pictures(server):
    import numpy as np
    from PIL import Image

    one = {strength: saved_picture(server, server.run(graph(strength=strength))[1]) for strength in (0.8, 0)}
    many = {name: n for name, n in graph().items() if name not in ("4", "5")}
    many["6"] = node("PerfusionGateSweep", model=["1", 0], clip=["1", 1], concept=["3", 0], strengths=".8, 0")
    many["13"] = node("PreviewAny", source=["6", 2])
    if "ImageGrid" in server.call("/object_info"):  # since the end of 2025
        many["14"] = node("ImageGrid", images=["11", 0], columns=2, cell_width=64, cell_height=64, padding=0)
        many["15"] = node("SaveImage", images=["14", 0], filename_prefix="grid")
    status, outputs, errors = server.run(many)
    assert status == "success", errors
    pictures = [Image.open(server.base / "output" / p["filename"]).convert("RGB") for p in outputs["12"]["images"]]
    assert [p.tobytes() for p in pictures] == list(one.values())
    assert outputs["13"]["text"] == ["<mimi> .8", "<mimi> 0"]
    if "14" in many:
        grid = Image.open(server.base / "output" / outputs["15"]["images"][0]["filename"]).convert("RGB")
        assert np.array_equal(np.asarray(grid), np.concatenate([np.asarray(p) for p in pictures], axis=1))


def test_a_map_belongs_to_its_picture_also_where_the_host_has_the_picture_already(server):
    from PIL import Image

    def drawn(seed, shown=True, prefix="map"):
        boxes = {name: n for name, n in graph().items() if name != "4"}
        boxes["10"] = node("KSampler", **{**boxes["10"]["inputs"], "model": ["13", 0], "seed": seed})
        boxes["13"] = node("PerfusionTrace", model=["6", 0])
        if shown:
            boxes["14"] = node("PerfusionWhere", trace=["13", 1], samples=["10", 0], image=["11", 0])
            boxes["15"] = node("SaveImage", images=["14", 0], filename_prefix=prefix)
        status, outputs, errors = server.run(boxes)
        assert status == "success", errors
        if shown:
            return Image.open(server.base / "output" / outputs["15"]["images"][0]["filename"]).tobytes()
        return saved_picture(server, outputs)

    assert drawn(7, shown=False) == saved_picture(server, server.run(graph())[1])
    first = drawn(7)  # the sampler does not run again
    assert drawn(8) != first
    assert drawn(7, prefix="again") == first


def test_a_tune_is_found_on_disk_after_the_host_has_forgotten_it(server):
    def kept():
        return {path: path.stat().st_mtime_ns for path in (server.base / "models/perfusion/cache").iterdir()}

    server.run(graph(seed=3))
    before = kept()
    server.call("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)
    status, outputs, errors = server.run(graph(seed=3))
    assert status == "success", errors
    assert kept() == before, "learning again would have written again"
    assert outputs["3"]["images"]


def test_a_cancel_keeps_what_was_learnt_and_leaves_the_model_as_it_was(server):
    _, before, _ = server.run(graph(seed=1))
    running = server.queue(graph(seed=5, steps=2000))
    folder = server.base / "output" / "perfusion"
    time.sleep(4)
    server.call("/interrupt", {})
    status, _, errors = server.wait(running)
    assert status == "error" and not errors, "an interrupt, not an exception"
    stopped = list(folder.glob("mimi-stopped-at-*.safetensors"))
    assert len(stopped) == 1
    listed = server.call("/object_info/PerfusionLoadConcept")["PerfusionLoadConcept"]["input"]["required"]
    assert stopped[0].name in (listed["concept_name"][1].get("options") or listed["concept_name"][0])
    again = {**graph(seed=1), "9": node("EmptyLatentImage", width=64, height=64, batch_size=1)}
    again["12"] = node("SaveImage", images=["11", 0], filename_prefix="again")
    status, after, errors = server.run(again)
    assert status == "success", errors
    assert saved_picture(server, after) == saved_picture(server, before)


@pytest.mark.parametrize("change, sentence", [
    ({"superclass": "big cat"}, "one plain word"),
    ({"superclass": ""}, "one plain word"),
    ({"word": "cat"}, "angle brackets"),
    ({"image": ["13", 0]}, "64 on each side"),
])
def test_a_mistake_gets_a_sentence_on_the_node(server, change, sentence):
    wrong = graph(seed=11)
    wrong["13"] = node("EmptyImage", width=1, height=1, batch_size=1, color=0)
    wrong["3"]["inputs"] |= change
    status, _, errors = server.run(wrong)
    assert status == "error"
    assert errors[0]["node_id"] == "3" and sentence in errors[0]["exception_message"]


def test_the_web_folder_is_served(server):
    assert any("perfusion" in path for path in server.call("/extensions"))
