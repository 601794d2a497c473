"""What goes to the Comfy registry: the facts in pyproject.toml, the two pictures, and an archive that works alone."""

import importlib.util
import re
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
from PIL import Image

from served import serving
from test_server import node

pytestmark = pytest.mark.host
ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def git(*arguments):
    return set(subprocess.run(["git", "ls-files", *arguments], cwd=ROOT, check=True, capture_output=True,
                              text=True).stdout.splitlines())


def published():
    """What `comfy node publish` puts into the archive: what git tracks, less .comfyignore."""
    return git() - git("--cached", "--ignored", "--exclude-from=.comfyignore")


def test_the_registry_reads_all_that_it_wants_to_know(monkeypatch):
    from comfy_config.config_parser import extract_node_configuration

    monkeypatch.chdir(ROOT.parent)
    facts = extract_node_configuration(str(ROOT))
    project, comfy = facts.project, facts.tool_comfy
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", project.name) and "comfyui" not in project.name
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version) and project.description and comfy.display_name
    assert (ROOT / project.license.file).exists() and project.requires_python == ">=3.10"
    assert project.supported_os == ["OS Independent"] and project.supported_comfyui_version == ">=0.3.64"
    assert project.urls.repository and project.urls.documentation and project.urls.issues
    assert f"\n## {project.version} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_address_and_the_workflow_name_one_owner_and_one_repository():
    named = re.findall(r"(?:github|githubusercontent)\.com/([^/\"]+/[^/\"#]+)", PYPROJECT)
    workflow = (ROOT / ".github/workflows/publish.yml").read_text(encoding="utf-8")
    assert len(named) == 5 and set(named) == set(re.findall("github.repository == '(.+)'", workflow))
    assert "Comfy-Org/publish-node-action@" in workflow and "secrets.REGISTRY_ACCESS_TOKEN" in workflow


def test_icon_and_banner_are_where_their_addresses_say_and_of_the_registrys_shapes():
    places = [ROOT / place for place in re.findall(r'"https://raw\.[^"]+/main/(.+)"', PYPROJECT)]
    assert [place.name for place in places] == ["icon.png", "banner.png"]
    (w, h), (wide, high) = (Image.open(place).size for place in places)
    assert w == h <= 400 and wide * 9 == high * 21


def test_the_archive_holds_what_an_artist_needs_and_nothing_of_the_workshop():
    files = published()
    rooms = {file.partition("/")[0] for file in files}
    assert rooms >= {"__init__.py", "nodes", "core", "headless", "demo", "web", "locales", "example_workflows",
                     "subgraphs", "pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE"}
    assert not rooms & {"bench", "tests", ".ci", ".github", "Makefile", "pictures"}
    assert [file for file in files if "dev" in Path(file).stem or file.startswith(".")] == []
    workflows = [Path(file) for file in files if file.startswith("example_workflows/")]
    assert {path.stem for path in workflows if path.suffix == ".json"} == {path.stem for path in workflows
                                                                           if path.suffix == ".jpg"}
    assert sum((ROOT / file).stat().st_size for file in files) < 64 * 2**20


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The published files as the manager unpacks them: a folder of their own under custom_nodes."""
    folder = tmp_path_factory.mktemp("base") / "custom_nodes" / "perfusion-concepts"
    for file in published():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def server(archive):
    from perfusion.headless.comfy import find

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYUI_PATH", str(find()))
        spec = importlib.util.spec_from_file_location("published_comfy", archive / "headless" / "comfy.py")
        comfy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(comfy)
        with serving(archive.parent.parent, comfy.serve) as talk:
            yield talk


def test_the_archive_alone_has_all_nodes_and_makes_a_picture_of_the_demo(server, archive, pack):
    assert not archive.is_symlink() and not (archive / "bench").exists()
    there = server.call("/object_info")
    assert {name for name in there if name.startswith("Perfusion")} == set(pack)
    status, outputs, errors = server.run({
        "1": node("PerfusionDemoModel"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a red creature in the snow"),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "5": node("KSampler", model=["1", 0], positive=["2", 0], negative=["3", 0], latent_image=["4", 0], seed=7,
                  steps=4, cfg=5, sampler_name="euler", scheduler="normal", denoise=1),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="picture"),
        "8": node("PerfusionConceptDoctor", model=["1", 0], clip=["1", 1]),
    })
    assert status == "success", errors
    picture = Image.open(server.base / "output" / outputs["7"]["images"][0]["filename"]).convert("L")
    low, high = picture.getextrema()
    assert picture.size == (128, 128) and high - low > 60
    assert "Nothing is wrong." in outputs["8"]["text"][0]


def test_a_second_look_of_the_doctor_is_a_new_one(server):
    def look():
        status, outputs, errors = server.run({"1": node("PerfusionConceptDoctor")})
        assert status == "success", errors
        return outputs["1"]["text"][0]

    assert "`new.safetensors`" not in look()
    (server.base / "output" / "perfusion").mkdir(parents=True)
    (server.base / "output" / "perfusion" / "new.safetensors").write_bytes(b"")
    again = look()
    assert "✗ 'new.safetensors' is not a whole .safetensors" in again and str(Path.home()) not in again


def test_pages_and_texts_of_the_archive_are_served(server, archive):
    scripts = {f"/extensions/perfusion-concepts/{path.name}" for path in (archive / "web").glob("*.js")}
    assert scripts and scripts <= set(server.call("/extensions"))
    assert "PerfusionQuickTune" in server.call("/i18n")["zh"]["nodeDefs"]
    assert "creature_demo" in server.call("/api/workflow_templates")["perfusion-concepts"]


def test_the_box_of_the_archive_is_in_the_hosts_list(server, archive):
    try:
        boxes = {entry["name"] for entry in server.call("/global_subgraphs").values()}
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        pytest.skip("this version of the host knows no boxes")
    assert {path.stem for path in (archive / "subgraphs").iterdir()} <= boxes


def test_the_archives_commands_need_nothing_that_is_left_out(archive, tmp_path):
    done = subprocess.run([sys.executable, "-m", "headless", "doctor", str(tmp_path / "gone")], cwd=archive,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "There is no file" in done.stdout, done.stderr
