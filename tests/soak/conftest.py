"""What weeks of use do to one server, in minutes. A small share is in `make test`, all of it in `make test-soak`, which
prints what was counted and writes it to bench/results/soak.json."""

import pytest

from counted import Counts

counts = Counts("soak")


@pytest.fixture
def tally():
    """Takes down how often something was done, {what: times}, under a heading. A test does that as its last."""
    return counts.take


def pytest_terminal_summary(terminalreporter, config):
    counts.tell(terminalreporter, config)
