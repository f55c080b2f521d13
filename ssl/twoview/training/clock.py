"""Time measurement on devices that work asynchronously."""

import time
from typing import Any

import torch


def wait_for(device: torch.device) -> None:
    """Wait until a CUDA device has done all its work; no-op on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Sums the durations between calls of :meth:`start` and :meth:`stop`.

    On CUDA, the time is that of the device, measured by events, and neither call waits. On other devices, it is that of
    the host.

    Args:
        device: device of the work that is measured.

    Example:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> watch.start()
        >>> watch.stop()
        >>> 0 < watch.total() < 1, watch.total()
        (True, 0.0)
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.laps: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Start a measurement."""
        self.started = self._now()

    def stop(self) -> None:
        """End the measurement."""
        self.laps.append((self.started, self._now()))

    def total(self) -> float:
        """Return the sum in seconds, and start again from 0. On CUDA, waits for the end of the last measurement."""
        laps, self.laps = self.laps, []
        if not self.on_cuda:
            return float(sum(end - start for start, end in laps))
        if laps:
            laps[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in laps)) / 1000

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
