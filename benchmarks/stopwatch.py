"""Seconds of some training steps, without the preparations and without the first steps."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from side_by_side import wait_for_gpu

WARM_UP = 2  # batches before the measurement: allocators and loader processes are as in a long run afterwards


def seconds_of_steps(step: Callable[[Any], Any], batches: Iterable[Any], steps: int) -> float:
    """Call ``step`` for ``WARM_UP`` batches, then for ``steps`` batches, and return the seconds of the latter.

    Args:
        step: function of a batch.
        batches: an iterable of at least ``WARM_UP + steps`` batches. With loader processes it should have as many more
            as these prefetch, so that they are busy until the end as in a long epoch.
        steps: number of batches whose time is measured, including the time to load them.
    """
    source = iter(batches)
    for _ in range(WARM_UP):
        step(next(source))
    wait_for_gpu()
    start = time.perf_counter()
    for _ in range(steps):
        step(next(source))
    wait_for_gpu()
    return time.perf_counter() - start


class Stopwatch(L.Callback):
    """Measures the seconds of ``steps`` batches after ``WARM_UP`` batches of a Lightning Trainer."""

    def __init__(self, steps: int) -> None:
        self.steps, self.batches = steps, 0
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time before the first and after the last measured batch."""
        self.batches += 1
        if self.batches in (WARM_UP, WARM_UP + self.steps):
            wait_for_gpu()
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds between both times."""
        first, last = self.times
        return last - first
