"""Webdataset shards as an album: .tar files in which `cat-12.jpg` and `cat-12.txt` lie beside each other.

    train-domain MODEL "/data/faces-{000..099}.tar" …        or a glob, or a folder with such files in it

A tar is read through once for where in it each picture begins; that is kept in the work folder, and from then on any
row is read from its place, so that a step's rows are drawn as they are of a folder. Nothing is ever unpacked to a disk.
The pictures of a step are read as it comes, by the process whose share they are, and nothing that VAE and tower see of
them is kept but of a sample, by which the encoder is standardised and members are told.
"""

import io
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import safetensors
import torch
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from core.file import brief, pack, write
from core.fingerprint import fingerprint

from . import pictures
from .album import HELD, KINDS, READERS, Folder, captions_of, enough, look, square

SAMPLE = 4096  # pictures that say for all what the tower sees
AGAIN = "Pack it again, or leave it out."


def opened(said: str, work: Path, say=print):
    """The album that a folder, a glob or a brace pattern of .tar files names. Raises ValueError where it is none."""
    folder = Path(said)
    if folder.is_dir():
        found = sorted(folder.rglob("*.tar"))
        if not found:
            return Folder(folder)
        if any(p.suffix.lower() in KINDS for p in folder.rglob("*")):
            raise ValueError(f"'{folder}' holds both shards (.tar) and pictures. Name the shards alone: "
                             f"'{folder / '*.tar'}'.")
        return Shards(found, work, say)
    if "://" in said or said.startswith("pipe:"):
        raise ValueError(f"Shards are read from a disk of this machine or one that it mounts; got '{said}'. Mount the "
                         "store that they lie on, and give their path.")
    if not said.endswith((".tar", ".tar.gz", ".tgz")):
        raise ValueError(f"'{said}' is no folder, and names no .tar files either.")
    found = [path for one in expand_urls(said) for path in glob(one) or [one]]
    return Shards(sorted({Path(path) for path in found}), work, say)


def index(shard: Path):
    """(name, begin, size, begin of its text or -1, size of that) of each picture in a shard, in its order. Raises
    ValueError where the shard is damaged, holds no picture, or names a place outside of itself."""
    found, texts = [], {}
    try:
        with tarfile.open(shard, "r:") as tar:
            while member := tar.next():
                tar.members.clear()  # else all are kept
                if not member.isreg():
                    continue
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError(f"it names a place outside of it, '{member.name}'")
                key, kind = base_plus_ext(member.name)
                if kind and f".{kind.lower()}" in KINDS:
                    found.append((key, member.name, member.offset_data, member.size))
                elif kind == "txt":
                    texts[key] = member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it ends in the middle")  # tarfile takes that for the end
    except FileNotFoundError:
        raise ValueError(f"The shard '{shard}' is not there.") from None
    except Exception as error:  # hostile bytes make a library raise anything
        if getattr(error, "errno", None):
            raise
        raise ValueError(f"'{shard}' cannot be read as an uncompressed .tar file ({brief(error)}). {AGAIN}") from error
    if not found:
        raise ValueError(f"The shard '{shard}' holds no picture ({', '.join(KINDS)}). {AGAIN}")
    return [(name, begin, size, *texts.get(key, (-1, 0))) for key, name, begin, size in found]


class Shards:
    """The pictures of .tar files, by their places in them. Raises ValueError as `index` does, and where they are too
    few."""

    def __init__(self, paths: list[Path], work: Path, say=print):
        self.paths = paths
        stats = [path.stat() if path.exists() else None for path in paths]
        files = [(str(path), stat and stat.st_size, stat and stat.st_mtime_ns) for path, stat in zip(paths, stats)]
        self.state = fingerprint(files)
        kept = work / f"index-{self.state[:16]}.safetensors"
        if not kept.exists():
            self._read_through(kept, say)
        with safetensors.safe_open(kept, "pt") as file:
            self.hash = file.metadata()["hash"]
            self.places, self.names, self.ends = (file.get_tensor(name) for name in ("places", "names", "ends"))
        enough(len(self), paths[0], f"in {len(paths)} shards")

    def _read_through(self, kept: Path, say):
        """Write the index of all shards."""
        places, names, lengths, hashes, count = [], [], [], [], 0
        for k, path in enumerate(self.paths):
            found = index(path)
            written = [name.encode(errors="surrogateescape") for name, *_ in found]
            names.append(b"".join(written))
            lengths.append(torch.tensor([len(name) for name in written]))
            places.append(torch.tensor([(k, *place) for _, *place in found]))
            hashes.append(fingerprint(path.name, found))
            count += len(found)
            end = "\n" if k + 1 == len(self.paths) else ""
            say(f"\rshards read through, once: {k + 1} of {len(self.paths)}, {count} pictures ", end=end, flush=True)
        joined = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        write(kept, pack({"places": torch.cat(places), "names": joined, "ends": torch.cat(lengths).cumsum(0)},
                         {"hash": fingerprint(hashes)}))

    def __len__(self):
        return len(self.places)

    def name(self, row: int) -> str:
        begin = int(self.ends[row - 1]) if row else 0
        name = bytes(self.names[begin : self.ends[row]].tolist()).decode(errors="replace")
        return f"{self.paths[self.places[row, 0]]}: {name}"

    def picture(self, row: int) -> torch.Tensor:
        return pictures.read(io.BytesIO(self._read(row, 1)), self.name(row))

    def beside(self, row: int) -> bytes | None:
        return self._read(row, 3) if self.places[row, 3] >= 0 else None

    def _read(self, row: int, at: int) -> bytes:
        shard, begin, size = self.places[row, [0, at, at + 1]].tolist()
        with self.paths[shard].open("rb") as file:
            file.seek(begin)
            return file.read(size)

    def sample(self, seed: int) -> list[int]:
        """The rows of which is kept what VAE and tower see: all, or of more than SAMPLE one of each of equal parts, and
        those that are held out."""
        if len(self) <= SAMPLE:
            return list(range(len(self)))
        parts, count = SAMPLE - HELD, len(self) - HELD
        within = torch.rand(parts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return [*((torch.arange(parts) + within) * count / parts).long().tolist(), *range(count, len(self))]


def passing(album: Shards, rows, turns, count: int, host, tower, resolution: int):
    """(latents, class tokens, captions) of rows of the first `count` pictures of shards, read as they are needed.

    The sample is read before anything is learnt, and stops for what it finds: what is wrong with many is known by then.
    Where one of the others cannot be learnt from, that is said, and the next picture takes its place, on whatever
    process and in whatever run: one file in a million should not end a week's work.
    """
    def sound(row):
        """The row of the first picture from here on that can be read, and its square."""
        while True:
            try:
                return row, square(album.picture(row), resolution)
            except ValueError as error:
                row = after(row, error)

    def after(row, error):
        print(f"\n{error} The next picture takes its place.", file=sys.stderr, flush=True)
        return (row + 1) % count

    images, said = [], []
    with ThreadPoolExecutor(READERS) as readers:
        for (row, image), turn in zip(readers.map(sound, rows.tolist()), turns.tolist()):
            while True:
                try:
                    lines = captions_of(album, row, host)
                    break
                except ValueError as error:
                    row, image = sound(after(row, error))
            images.append(image)
            said.append(lines[turn % len(lines)])
    return *look(torch.cat(images), host, tower), said
