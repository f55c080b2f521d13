"""Seconds of some training steps, without the preparations and without the first step."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from side_by_side import wait_for_gpu


def seconds_of_steps(step: Callable[[Any], Any], batches: Iterable[Any], steps: int) -> float:
    """Call ``step`` for a first batch, then for ``steps`` batches, and return the seconds of the latter.

    Args:
        step: function of a batch.
        batches: an iterable of more than ``steps`` batches. With loader processes it should have as many more as these
            prefetch, so that they are busy until the end as in a long epoch.
        steps: number of batches whose time is measured, including the time to load them.
    """
    source = iter(batches)
    step(next(source))
    wait_for_gpu()
    start = time.perf_counter()
    for _ in range(steps):
        step(next(source))
    wait_for_gpu()
    return time.perf_counter() - start


class Stopwatch(L.Callback):
    """Measures the seconds of ``steps`` batches after the first batch of a Lightning Trainer, as above."""

    def __init__(self, steps: int) -> None:
        self.steps, self.batches = steps, 0
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time after the first batch and after the last one."""
        self.batches += 1
        if self.batches in (1, 1 + self.steps):
            wait_for_gpu()
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds between both times."""
        first, last = self.times
        return last - first
