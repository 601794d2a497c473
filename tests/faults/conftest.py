"""What goes wrong in real use, done for real. A small share is in `make test`, all of it in `make test-faults`, which
prints how much that was and writes it to bench/results/faults.json."""

import pytest

from counted import Counts
from judged import KEPT

counts = Counts("faults")


@pytest.fixture
def tally():
    """Takes down how often something was done, {what: times}, under a heading. A test does that as its last."""
    KEPT.mkdir(parents=True, exist_ok=True)
    return counts.take


def pytest_terminal_summary(terminalreporter, config):
    counts.tell(terminalreporter, config)
