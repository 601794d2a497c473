"""Tune for each line of a table, on one process or under `accelerate launch` on many.

    python -m headless tune MODEL --manifest people.csv --superclass person --out concepts
    accelerate launch --num_processes 4 -m headless tune MODEL --manifest people.csv …      the same files, sooner

    picture,word,superclass
    anna-1.jpg;anna-2.jpg,<anna>,woman
    rex.png,<rex>,

The model is opened once by each process, and of the lines without a file each takes every nth. All of the table is
looked at before anything is learnt. Of each concept one line of JSON is printed, and put at the end of
`<out>/people-<process>.jsonl`: each process has a file of its own, as lines that several machines append to one file of
a shared folder can be lost. A concept that fails says why in its line, and the others go on. A concept's file is there
whole or not at all, so a run that was killed goes on with the lines that have none.
"""

import csv
import io
import json
import sys
import time
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import torch

from core.concept import check_word
from core.host_diffusers import DiffusersHost
from core.once_more import FACT

from . import learn

COLUMNS = "picture", "word", "superclass", "mask", "concept", "steps", "seed", "out"
SHOWN = 20  # of what is wrong with a table


def tune(arguments):
    """Learn a concept from one or several pictures of one thing, or one for each line of a table."""
    if bool(arguments.pictures) == bool(arguments.manifest):
        raise ValueError("Give pictures of one thing, or the table of many with --manifest; got "
                         f"{'both' if arguments.pictures else 'neither'}.")
    if not (arguments.superclass or arguments.manifest):
        raise ValueError("Give the plain word for its kind, such as --superclass cat.")
    (many if arguments.manifest else learn.tune)(arguments)


def read(arguments) -> list[Namespace]:
    """For each line of the table the command's arguments, with what the line says in their place, the file that it is
    for as `out`, and its number as `line`. Raises ValueError with all that is wrong."""
    path = Path(arguments.manifest)
    if Path(arguments.out).suffix == ".safetensors":
        raise ValueError(f"With --manifest, --out names the folder for all files; got '{arguments.out}'.")
    try:
        table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        names = [(name or "").strip() for name in table.fieldnames or ()]
        table.fieldnames = names
        lines = [(table.line_num, cells) for cells in table]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not a table of comma-separated values in UTF-8 ({error}).") from error
    strange = [f"'{name}'" for name in names if name not in COLUMNS or names.count(name) > 1]
    if strange or "picture" not in names:
        raise ValueError(f"The first line of '{path}' names its columns, with commas between them: picture, and of "
                         f"{', '.join(COLUMNS[1:])} those that it needs, each once. It has "
                         f"{'unknown or double ' + ', '.join(strange) if strange else 'no picture'}.")
    if not lines:
        raise ValueError(f"'{path}' has columns and no line below them, so there is nothing to learn.")
    rows, wrong, taken = [], [], {}
    for number, cells in lines:
        row, said = _row(arguments, path.parent, cells)
        row.line = number
        first = taken.setdefault(row.out.resolve(), number)
        if first != number:
            said.append(f"its file is '{row.out}', as that of line {first}: give one another word or out")
        rows.append(row)
        wrong += [f"line {number}: {one}" for one in said]
    refuse(path, wrong)
    return rows


def refuse(path, wrong: list[str]):
    """Raise ValueError where something is wrong with a table."""
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise ValueError("\n".join([f"Nothing was learnt, as '{path}' is not right yet:", *wrong[:SHOWN], *more]))


def _row(arguments, folder: Path, cells: dict) -> tuple[Namespace, list[str]]:
    """The arguments of one line, and what is wrong with it."""
    said = [f"it has more cells than there are columns ({cell!r}); a cell with a comma in it needs quotes"
            for cell in cells.pop(None, [])[:1]]
    cells = {name: cell.strip() for name, cell in cells.items() if cell and cell.strip()}
    row = Namespace(**vars(arguments) | cells)
    row.pictures = [folder / part.strip() for part in cells.get("picture", "").split(";") if part.strip()]
    if not row.pictures:
        said.append("it names no picture")
    for name in cells.keys() & {"mask", "concept"}:
        setattr(row, name, folder / cells[name])
    files = [("picture", path) for path in row.pictures] + [(name, getattr(row, name)) for name in ("mask", "concept")]
    said += [f"there is no {name} '{path}'" for name, path in files if path and not Path(path).is_file()]
    if not row.superclass:
        said.append("it names no superclass, and there is no --superclass for it")
    for name, least in ("steps", 1), ("seed", 0):
        value = getattr(row, name)
        if value is not None and (not str(value).isdecimal() or int(value) < least):
            said.append(f"{name} is a whole number from {least}; got '{value}'")
        elif value is not None:
            setattr(row, name, int(value))
    try:
        check_word(row.word)
    except ValueError as error:
        said.append(str(error))
    row.out = learn.place(Path(arguments.out) / cells.get("out", ""), row.word.strip("<>"))
    return row, said


def many(arguments):
    """Learn what the table says: this process its share of it."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    rows = read(arguments)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))  # the first waits for the last
    pipe, folder = learn.open_model(arguments.model)
    pipe.to(state.device)
    hosts, wrong = {}, []
    for row in rows:
        if row.superclass not in hosts:
            try:
                hosts[row.superclass] = DiffusersHost(pipe, row.superclass, folder, to_stderr)
            except ValueError as error:
                wrong.append(f"line {row.line}: {error}")
    refuse(arguments.manifest, wrong)
    with state.main_process_first():
        hosts[rows[0].superclass].inverse_covariance()  # its captions are read once for all
    # what the first process sees, so that all share out the same
    [left] = broadcast_object_list([[k for k, row in enumerate(rows) if not row.out.exists()]])
    there = len(rows) - len(left)
    if state.is_main_process:
        print(f"{len(left)} concepts to learn, on {state.num_processes} processes; {there} have their file already and "
              "are skipped.", file=sys.stderr, flush=True)
    log = Path(arguments.out) / f"{Path(arguments.manifest).stem}-{state.process_index}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    for k in left[state.process_index :: state.num_processes]:
        told = one(hosts[rows[k].superclass], rows[k]) | {"process": state.process_index}
        failed += "error" in told
        line = json.dumps(told, ensure_ascii=False) + "\n"
        sys.stdout.write(line)  # in one piece, as other processes write there too
        sys.stdout.flush()
        with log.open("a", encoding="utf-8") as file:
            file.write(line)
    failed = sum(gather_object([failed]))  # once all are done: one that ends in an error ends the others
    if state.is_main_process:
        print(f"{len(left) - failed} concepts learnt, {there} skipped, {failed} failed.", file=sys.stderr)
        if failed:
            every = log.with_name(f"{Path(arguments.manifest).stem}-*.jsonl")
            raise ValueError(f"Of {len(rows)} concepts {failed} could not be learnt: their lines in '{every}' have an "
                             "\"error\". The same command tries these again.")


def one(host, row) -> dict:
    """What is told of one line's concept, which is learnt here."""
    told = {"line": row.line, "file": str(row.out), "word": row.word, "superclass": row.superclass}
    begun = time.monotonic()
    try:
        learnt = learn.learn(host, row, *learn.given(row), row.out, lambda progress: None, lambda text: None)
        facts = learnt.training
        told |= {"steps": facts["steps"], "loss": facts["loss"], "bytes": row.out.stat().st_size}
        told |= {FACT: facts[FACT]} if FACT in facts else {}
    except (ValueError, OSError, host.out_of_memory) as error:
        told["error"] = " ".join(str(error).split())
    if "error" in told:
        host.spare()  # here, where the frames of what failed are gone
    return told | {"seconds": round(time.monotonic() - begun, 2)}


def to_stderr(done, total):
    learn.captions(done, total, file=sys.stderr)
