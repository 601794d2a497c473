"""Where concepts are read and written: models/perfusion/concepts, and output/perfusion for what was just saved."""

import hashlib
from pathlib import Path

import folder_paths

from ..core import concept as files

NAME = "perfusion"  # in folder_paths, and in a user's extra_model_paths.yaml


def models() -> Path:
    """The pack's folder under the models: covariances, cached tunes and a user's own captions.txt are here too."""
    return Path(folder_paths.models_dir) / "perfusion"


def saved() -> Path:
    return Path(folder_paths.get_output_directory()) / "perfusion"


def register():
    """Make the folders known to the host, after those that extra_model_paths.yaml may have named."""
    paths, _ = folder_paths.folder_names_and_paths.get(NAME, ([], set()))
    own = [str(path) for path in (models() / "concepts", saved()) if str(path) not in paths]
    folder_paths.folder_names_and_paths[NAME] = (paths + own, {".safetensors"})


def names() -> list[str]:
    return folder_paths.get_filename_list(NAME)


def find(name: str) -> Path:
    """The file of a concept in the list. Raises ValueError with where it was looked for."""
    path = folder_paths.get_full_path(NAME, name)
    if path is None:
        places = " or ".join(folder_paths.get_folder_paths(NAME))
        raise ValueError(f"The concept '{name}' was not found in {places}. Put the file there, or choose another one.")
    return Path(path)


def free(name: str, data: bytes) -> Path:
    """A path under output/perfusion for a concept to be saved: its name, numbered where another file has it.

    A file with the very same content is the same concept and keeps its name.
    """
    name = Path(name.strip().removesuffix(".safetensors")).name or "concept"
    digest = hashlib.sha256(data).digest()
    for number in range(1, 10**6):
        path = saved() / (f"{name}.safetensors" if number == 1 else f"{name}-{number}.safetensors")
        if not path.exists() or hashlib.sha256(path.read_bytes()).digest() == digest:
            return path
    raise AssertionError("a million files of one name")


def save(concept: files.Concept, name: str) -> Path:
    """Write the concept under output/perfusion, never over another one."""
    data = files.dump(concept)
    return files.write(free(name, data), data)
