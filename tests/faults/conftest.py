"""What goes wrong in real use, done for real. A small share is in `make test`, all of it in `make test-faults`, which
prints how much that was and writes it to bench/results/faults.json."""

import importlib.util
import json
from collections import defaultdict
from pathlib import Path

import pytest

from judged import KEPT

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "faults.json"
counts = defaultdict(dict)
collect_ignore = []
if not importlib.util.find_spec("comfy"):  # which tests/conftest.py has told of
    collect_ignore = [p.name for p in Path(__file__).parent.glob("test_*.py")
                      if "pytest.mark.host" in p.read_text(encoding="utf-8")]


@pytest.fixture
def tally(request):
    """Takes down how often something was done, {what: times}, under a heading. A test does that as its last."""
    KEPT.mkdir(parents=True, exist_ok=True)
    return lambda heading, **times: counts[heading].update(times)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not counts:
        return
    terminalreporter.section("faults")
    for heading, times in sorted(counts.items()):
        terminalreporter.line(f"{heading}: " + ", ".join(f"{times[what]} {what}" for what in sorted(times)))
    if config.option.markexpr == "faults":  # of the tests that ran now; of others what stood there remains
        held = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        for heading, times in counts.items():
            held.setdefault(heading, {}).update(times)
        RESULTS.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")
