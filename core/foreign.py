"""Files that other programs wrote with torch.save, read safely.

They are pickles in an archive, and never unpickled freely: the classes that a file names are compared with a short list
before it is read, the few that only carry settings become inert stand-ins, and torch.load reads the rest with
weights_only. Tensors stay on the disk until they are used, so that a file may be larger than memory.
"""

import pickletools
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from .file import brief

LARGEST_PICKLE = 2**20  # bytes; that of a whole UNet has some 400 KB
TENSORS = {"collections.OrderedDict", "builtins.set", "torch._utils._rebuild_parameter",
           "torch._utils._rebuild_tensor_v2"} | {f"torch.{t}Storage" for t in ("Float", "Half", "BFloat16", "Double")}
# What one list of omegaconf drags along: the whole configuration that it was part of, and its fields' types.
SETTINGS = {"torch.nn.modules.container.ParameterDict", "collections.defaultdict", "typing.Any", "typing.Dict",
            "typing.List"} | {f"builtins.{t}" for t in ("dict", "list", "int", "str", "float", "bool")}
SHARED = 20  # times that a pickle may use a tuple again: torch.save's never do
PYTHON_2 = {"__builtin__.long": "builtins.int", "__builtin__.unicode": "builtins.str"}  # in torch.save's protocol


def _stand_in(name: str) -> type:
    """A class that takes this one's place while reading: it keeps in `__dict__` what was stored, and does nothing."""
    module, _, own = name.rpartition(".")
    return type(own, (), {"__module__": module, "__init__": lambda self, *_: None})


@contextmanager
def readable(name: str, kind: str, *errors):
    """While open, these errors become a sentence that the file is not of the kind that is wanted."""
    try:
        yield
    except errors as error:
        raise ValueError(f"'{name}' cannot be read as {kind} ({type(error).__name__}). It is damaged or another kind "
                         "of file: fetch it again, or choose another.") from error


def _classes(path: Path, kind: str, largest: int) -> set[str]:
    """The classes that the file's pickle names; none of them is looked up."""
    name = path.name
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # hostile bytes make a reader raise anything
        raise ValueError(f"'{name}' ({path.stat().st_size / 1024:.0f} KB) is not a whole archive of torch.save. Fetch "
                         f"it again in case it was cut short, or choose {kind}.") from error
    with archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if sum(e.file_size for e in entries) > largest or sum(e.file_size for e in pickles) > LARGEST_PICKLE:
            raise ValueError(f"'{name}' unpacks to far more than {kind} holds, so it was not read. It is another kind "
                             "of file, or was made to do harm: choose another.")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # read from the disk as they lie there
            raise ValueError(f"'{name}' is compressed, which torch.save never does. Fetch the file as its program "
                             "wrote it.")
        with readable(name, kind, Exception):
            read = [[(op.name, arg) for op, arg, _ in pickletools.genops(archive.read(e))] for e in pickles]
            raw = {arg.replace(" ", ".") for ops in read for op, arg in ops if op == "GLOBAL"}
    if any(_tuples_used_again(ops) > SHARED for ops in read):
        raise ValueError(f"'{name}' holds tuples of tuples that take no end of time to read, so it was not read. It "
                         "was made to do harm: choose another.")
    return {PYTHON_2.get(n, n.replace("__builtin__.", "builtins.")) for n in raw}


def _tuples_used_again(ops) -> int:
    """How often a pickle's (name, argument) of each step ask for a tuple that was there before. A tuple of twice the
    same tuple, forty deep, is a few bytes; its hash takes years."""
    tuples, again, before, puts = set(), 0, "", 0
    for op, arg in ops:
        if op in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            at, puts = puts if op == "MEMOIZE" else int(arg), puts + 1
            (tuples.add if before.startswith("TUPLE") else tuples.discard)(at)
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            again += int(arg) in tuples
        before = op
    return again


def read(path, kind: str, largest: int) -> dict:
    """What a foreign file holds: tensors on the CPU, mapped from the disk, and stand-ins for settings; none of its code
    runs. `kind` says what is wanted ("a concept of …"), and such a file has no more than `largest` bytes.

    Raises ValueError where it is anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file '{path}'. Give the path of {kind}.")
    if path.stat().st_size > largest:
        raise ValueError(f"'{path.name}' has {path.stat().st_size / 2**20:.0f} MB, and {kind} has less than "
                         f"{largest / 2**20:.0f}. This is another kind of file: choose another.")
    classes = _classes(path, kind, largest)
    settings = {n for n in classes if n in SETTINGS or n.startswith("omegaconf.")}
    if strangers := sorted(classes - TENSORS - settings):
        raise ValueError(f"'{path.name}' asks for {brief(', '.join(strangers))}, which {kind} does not need and which "
                         "could run code. Nothing was run; do not open this file with other programs either.")
    with readable(path.name, kind, Exception), torch.serialization.safe_globals([_stand_in(n) for n in settings]):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise ValueError(f"'{path.name}' holds a {type(state).__name__}, not a dict of tensors. Choose {kind}.")
    return state
