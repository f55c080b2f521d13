"""Figures of a server in the text format of Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters, histograms and gauges of one server.

    Attributes:
        requests: finished requests by path and HTTP status.
        seconds: seconds from the headers of a request to the end of its answer, by path.
        batch: images in each batch of the network.
        encoder_seconds: seconds of each batch in the network and the index.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        name, registry = "twoview_", self._registry
        self.requests = Counter(f"{name}requests", "Requests.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            f"{name}request_seconds", "Seconds of a request.", ["path"], buckets=SECONDS, registry=registry
        )
        self.batch = Histogram(f"{name}batch_images", "Images of a batch.", buckets=BATCHES, registry=registry)
        self.encoder_seconds = Histogram(
            f"{name}batch_seconds", "Seconds of a batch in network and index.", buckets=SECONDS, registry=registry
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a figure that a function returns."""
        Gauge(f"twoview_{name}", text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self._registry)
