"""What the tests of a marker count, printed at their end and kept in bench/results under the marker's name."""

import json
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "bench" / "results"


class Counts:
    """What a marker's tests take down, {heading: {what: how many}}."""

    def __init__(self, marker: str):
        self.marker, self.path, self.counts = marker, RESULTS / f"{marker}.json", defaultdict(dict)

    def take(self, heading: str, **times):
        """Take down {what: how many} under a heading. A test does that as its last."""
        self.counts[heading].update(times)

    def tell(self, reporter, config):
        """Print them. Where the marker was asked for, keep them; of tests that did not run what stood there remains."""
        if not self.counts:
            return
        reporter.section(self.marker)
        for heading, times in sorted(self.counts.items()):
            reporter.line(f"{heading}: " + ", ".join(f"{times[what]} {what}" for what in sorted(times)))
        if config.option.markexpr == self.marker:
            held = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
            for heading, times in self.counts.items():
                held.setdefault(heading, {}).update(times)
            self.path.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")
