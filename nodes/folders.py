"""Where concepts and domains are read and written: models/perfusion/concepts and models/perfusion/domains, and
output/perfusion and output/perfusion/domains for what was just saved. The demo's domain comes with the pack."""

import hashlib
import os
import re
from pathlib import Path

import folder_paths

from ..core import concept as files
from ..core import domain as domains

NAME, DOMAINS = "perfusion", "perfusion_domains"  # in folder_paths, and in a user's extra_model_paths.yaml
DEMO = Path(__file__).parent.parent / "demo"
UNFIT = re.compile(r'[\x00-\x1f\x7f<>:"|?*\ud800-\udfff]')  # in the name of a file, on one system or another
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # on Windows, whatever follows
KINDS = {NAME: ("concept", "concepts", ""), DOMAINS: ("domain", "domains", "domains")}


def models() -> Path:
    """The pack's folder under the models: covariances, cached tunes and a user's own captions.txt are here too."""
    return Path(folder_paths.models_dir) / "perfusion"


def saved(kind: str = NAME) -> Path:
    return Path(folder_paths.get_output_directory()) / "perfusion" / KINDS[kind][2]


def register():
    """Make the folders known to the host, after those that extra_model_paths.yaml may have named."""
    for kind, (_, folder, _) in KINDS.items():
        paths, _ = folder_paths.folder_names_and_paths.get(kind, ([], set()))
        places = models() / folder, saved(kind), *([DEMO / folder] if kind == DOMAINS else [])
        own = [str(path) for path in places if str(path) not in paths]
        folder_paths.folder_names_and_paths[kind] = (paths + own, {".safetensors"})


def names(kind: str = NAME) -> list[str]:
    """The files of a kind. Those in output/perfusion/domains are no concepts."""
    found = folder_paths.get_filename_list(kind)
    return found if kind == DOMAINS else [name for name in found if Path("domains") not in Path(name).parents]


def find(name: str, kind: str = NAME) -> Path:
    """The file of a kind in the list. Raises ValueError with where it was looked for."""
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        places = " or ".join(folder_paths.get_folder_paths(kind))
        raise ValueError(f"The {KINDS[kind][0]} '{name}' was not found in {places}. Put the file there, or choose "
                         "another one.")
    return Path(path)


def free(name: str, data: bytes, kind: str = NAME) -> Path:
    """A path under output/perfusion for what is to be saved: its name, numbered where another file has it.

    A file with the very same content is the same and keeps its name. Every folder of the list is looked through: of
    two files of one name the list would give the first, and that might be the other one.
    """
    name = re.split(r"[\\/]", name.strip().removesuffix(".safetensors").rstrip("\\/"))[-1]
    name = UNFIT.sub("_", name).strip(". ") or KINDS[kind][0]
    name = f"_{name}" if DEVICES.fullmatch(name) else name
    if len(name.encode()) > 200:
        raise ValueError(f"The name '{name[:40]}…' is longer than a file's may be. Give a shorter one.")
    digest = hashlib.sha256(data).digest()
    for number in range(1, 10**6):
        listed = f"{name}.safetensors" if number == 1 else f"{name}-{number}.safetensors"
        path = Path(folder_paths.get_full_path(kind, listed) or saved(kind) / listed)
        if not path.exists():
            return path
        if path.stat().st_size == len(data) and hashlib.sha256(path.read_bytes()).digest() == digest:
            return path
    raise AssertionError("a million files of one name")


def save(concept: files.Concept, name: str) -> Path:
    """Write the concept under output/perfusion, never over another one."""
    return _put(name, files.dump(concept), NAME)


def save_domain(domain: domains.Domain, name: str) -> Path:
    """Write the domain under output/perfusion/domains, never over another one."""
    return _put(name, domains.dump(domain), DOMAINS)


def _put(name: str, data: bytes, kind: str) -> Path:
    while not (path := free(name, data, kind)).exists():
        try:
            return files.write(path, data, over=False)
        except FileExistsError:
            if not path.exists():  # it was no other server, which shares the folder and took the name first
                raise
    return path


def stamp(path: Path) -> tuple:
    """What changes when a file is replaced, even by one of the same size within one tick of the clock."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def found() -> dict[str, dict[Path, list[Path]]]:
    """For each kind ("concept", "domain") the folders that are looked in, and what is in the list from each."""
    return {word: {Path(place): [path for name in names(kind) if os.path.lexists(path := Path(place, name))]
                   for place in folder_paths.get_folder_paths(kind)} for kind, (word, _, _) in KINDS.items()}
