"""A measure that waits, in a forked process."""

import sys
import time
from dataclasses import dataclass

import hostile_runs

from twoview import cli
from twoview.evaluation import measure, progress, settings


@dataclass(frozen=True)
class Slow(measure.Measure):
    """Waits for some seconds, in steps of a tenth of a second."""

    name = "slow"
    seconds: int = 0

    def choose(self, inputs, earlier):
        print("waiting", file=sys.stderr, flush=True)
        for _ in progress.track(range(10 * self.seconds)):
            time.sleep(0.1)
        return {"value": 1.0}


def start(folder, seconds, *arguments, prepare=lambda: None):
    """Start a command that knows the measure; see :func:`hostile_runs.start`."""

    def main():
        settings.MEASURES["slow"] = Slow(seconds=seconds)
        cli.main()

    return hostile_runs.start(folder, "eval.k=[5]", "eval.bootstrap=100", *arguments, prepare=prepare, main=main)
