"""Work that is killed by `kill -9`, in a fork of this process so that each costs little."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

PACK = Path(__file__).parent.parent.resolve()
# While tests are collected, before one of torch.compile: after its FakeTensorMode no fork could learn (core/memory.py).
torch.zeros(1, requires_grad=True).backward()


def lines(work) -> int:
    """How many lines of the pack `work()` runs, in a fork that may do what it does."""
    ear, mouth = os.pipe()

    def counted():
        count = [0]
        _each_line(lambda: count.__setitem__(0, count[0] + 1))
        try:
            work()
        finally:
            sys.settrace(None)
            os.write(mouth, str(count[0]).encode())

    assert fork(counted) == 0
    os.close(mouth)
    with os.fdopen(ear, "rb") as heard:
        return int(heard.read())


def killed_at_line(work, line: int) -> bool:
    """Whether `work()` in a fork was killed, by itself as it came to its line so-and-so of the pack."""
    def dying():
        left = [line]

        def one():
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        _each_line(one)
        work()

    return _was_killed(fork(dying))


def killed_at_byte(work, byte: int) -> bool:
    """Whether `work()` in a fork was killed, by the kernel as it wrote byte so-and-so of some file."""
    import resource

    def dying():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))
        work()

    return _was_killed(fork(dying))


def killed_after(work, seconds: float) -> bool:
    """Whether `work()` in a fork was killed, from outside after so many seconds."""
    child = fork(work, wait=False)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return _was_killed(os.waitpid(child, 0)[1])


def killed_somewhere(work, total: int, r: random.Random) -> bool:
    """Whether `work()`, which runs `total` lines, was killed at one of them."""
    return killed_at_line(work, r.randrange(1, total + 1))


def fork(work, wait: bool = True) -> int:
    """Do `work()` in a fork; its status, or its process id where it is not waited for."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] if wait else child
    status = 1
    try:
        work()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _was_killed(status: int) -> bool:
    by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    assert by in (signal.SIGKILL, signal.SIGXFSZ) or status == 0, f"it failed by itself, with status {status}"
    return bool(by)


def _each_line(heard):
    own = str(PACK / "core"), str(PACK / "nodes"), str(PACK / "headless")

    def local(frame, event, arg):
        if event == "line":
            heard()
        return local

    sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename.startswith(own) else None)
