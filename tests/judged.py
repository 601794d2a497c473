"""Bad files before the code that reads them, in a process of its own that is watched.

Every file is either read and then is good for all that is done with it, or refused by a sentence of ours. The process
may not die, take a second for a file, take much memory, or open, write, move or run anything beside the file.
"""

import json
import mmap
import os
import re
import resource
import select
import signal
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

PACK = Path(__file__).parent.parent.resolve()
KEPT = PACK / "build" / "faults"  # what was judged badly
SECOND = 1.0  # of the processor, for one file
BALLOON = 256 * 2**20  # bytes, for one file
LONGEST = 1500  # characters of a sentence
SILENT = 90  # seconds after which the process hangs
FORBIDDEN = ("os.system os.exec os.spawn os.posix_spawn os.fork os.remove os.rename os.mkdir os.rmdir os.link "
             "os.symlink os.chmod os.chown os.truncate os.utime os.putenv subprocess.Popen socket.connect socket.bind "
             "shutil.rmtree shutil.move shutil.copyfile").split()
seen = []  # what the hook below has heard; a hook cannot be taken away again


def listen(allowed: Path):
    """Hear of everything that this process opens outside of `allowed`, but to read what Python has; and does."""
    readable = tuple(os.path.realpath(place) for place in (PACK, *filter(None, sys.path), sys.prefix, sys.base_prefix,
                                                           "/proc", "/sys", "/dev/null"))

    def heard(event, args):
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]).replace("\0", ""))
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            inside = path == str(allowed) or path.startswith(f"{allowed}/")
            if not inside and (writes or not path.startswith(readable)):
                seen.append(f"open {path}")
        elif event in FORBIDDEN and str(allowed) not in str(args[:1]) and "127.0.0.1" not in str(args):
            seen.append(f"{event} {args}")

    sys.addaudithook(heard)


def ours(error: BaseException, kinds=(ValueError,)) -> str:
    """What is wrong with an error as a sentence of ours, or nothing."""
    said, last = str(error), error.__traceback__
    while last.tb_next:
        last = last.tb_next
    path = Path(last.tb_frame.f_code.co_filename).resolve()
    if not isinstance(error, kinds):
        return f"{type(error).__name__}: {said[:300]}"
    if path.parent not in (PACK / "core", PACK / "nodes", PACK / "headless"):
        return f"raised in {path.name}, not by us: {said[:300]}"
    if not re.fullmatch(r".{20,}[.]", said, re.DOTALL) or len(said) > LONGEST:
        return f"no sentence ({len(said)} characters): {said[:300]}"
    return ""


def lines_of(run, data, held=()):
    """What `run(data)` did, and which steps from line to line of our own code it took."""
    steps, last = set(), [None]

    def local(frame, event, arg):
        here = (frame.f_code.co_filename, frame.f_lineno)
        steps.add((last[0], here))
        last[0] = here
        return local

    def call(frame, event, arg):
        return local if frame.f_code.co_filename.startswith(str(PACK / "core")) else None

    sys.settrace(call)
    try:
        return judge(run, data), steps
    finally:
        sys.settrace(None)


def judge(run, data) -> str:
    """'read' or 'refused', and after a colon what was wrong with that."""
    seen.clear()
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        found = run(data) or "read"
    except AssertionError as error:
        found = "read: " + (str(error) or traceback.format_exc(limit=-2)[-300:])
    except Exception as error:
        wrong = ours(error)
        found = f"refused: {wrong}" if wrong else "refused"
    took = time.process_time() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if took > SECOND:
        found += f": took {took:.1f} s"
    if grown > BALLOON:
        found += f": took {grown / 2**20:.0f} MB"
    if seen:
        found += f": {seen[:3]}"
    return found


def every(run, cases, guided=None):
    """Judge cases one after another. `guided(data)` changes one that went a new way, again and again: (case, found)."""
    known, corpus = set(), []
    for case in cases:
        if guided is None:
            yield case, judge(run, case)
            continue
        case = guided(corpus, case)
        found, steps = lines_of(run, case)
        if steps - known:
            known |= steps
            corpus.append(case)
        yield case, found


def judged(run, cases, allowed: Path, guided=None) -> Counter:
    """How many files were read and how many refused, of all cases, in a fork. Asserts that nothing else came of any.

    `cases` gives bytes or text; `run(case)` reads one and answers nothing, or raises. `guided(corpus, case)` answers
    what is read in a case's place, where the ways through our code should lead the search.
    """
    shown, (ear, mouth) = mmap.mmap(-1, 64 * 2**20), os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(ear)
            listen(Path(allowed).resolve())
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 3 * 2**30,) * 2)
            seen.clear()
            with os.fdopen(mouth, "w") as say:
                def cases_shown():
                    for case in cases:
                        show(shown, case)
                        yield case

                def shown_guided(corpus, case):
                    made = guided(corpus, case)
                    show(shown, made)
                    return made

                for case, found in every(run, cases_shown(), guided and shown_guided):
                    kept = keep(case) if ":" in found else ""
                    say.write(json.dumps([found, kept]) + "\n")
                    say.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(mouth)
    counts, bad = Counter(), []
    for line in spoken(ear, child):
        found, kept = json.loads(line)
        counts[found.partition(":")[0]] += 1
        if ":" in found and len(bad) < 40:
            bad.append(f"{found.partition(': ')[2]}  [{kept}]")
    _, status = os.waitpid(child, 0)
    if status:
        bad.append(f"the process ended by {status}, reading {keep(last(shown))}")
    assert not bad, f"{len(bad)} were judged badly:\n" + "\n".join(sorted(set(bad)))
    return counts


def spoken(ear: int, child: int):
    """The child's lines. One that says nothing for long is ended."""
    text = b""
    with os.fdopen(ear, "rb", buffering=0) as heard:
        while True:
            if not select.select([heard], [], [], SILENT)[0]:
                os.kill(child, signal.SIGKILL)
            part = heard.read(2**16)
            if not part:
                return
            *lines, text = (text + part).split(b"\n")
            yield from lines


def show(shown, case):
    data = case if isinstance(case, bytes) else str(case).encode("utf-8", "surrogatepass")
    data = data[: len(shown) - 8]
    shown[: 8 + len(data)] = struct.pack("<Q", len(data)) + data


def last(shown) -> bytes:
    return shown[8 : 8 + struct.unpack("<Q", shown[:8])[0]]


def keep(case) -> str:
    """Put a case by, and answer where."""
    data = case if isinstance(case, bytes) else str(case).encode("utf-8", "surrogatepass")
    name = f"{zlib.crc32(data):08x}.bin"
    descriptor = os.open(str(KEPT / name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(descriptor, data)
    os.close(descriptor)
    return f"build/faults/{name}"
