"""The peak memory of a piece of work: of the process on Linux or of the GPU, in megabytes of 2^20 bytes; and of what
PyTorch's allocator on the CPU has given out, in bytes."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Peak:
    """`megabytes` is the most that any `with` block of it has reached; None before the first, or where nobody knows."""

    def __init__(self, device: str):
        self.cuda, self.megabytes = device == "cuda", None

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif CLEAR.exists():
            CLEAR.write_text("5")  # the high-water mark falls to what is used now

    def __exit__(self, *error):
        found = torch.cuda.max_memory_allocated() // 2**20 if self.cuda else None
        if not self.cuda and STATUS.exists():
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            found = int(line.split()[1]) // 1024
        if found is not None:
            self.megabytes = max(found, self.megabytes or 0)


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that work held at once of what the CPU's allocator gave it, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())
