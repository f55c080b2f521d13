"""The running server: uvicorn with the time limits of connections, until a signal."""

import asyncio
import contextlib
import logging
import math
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from twoview.encoder import Encoder
from twoview.serving.app import Service, create_app
from twoview.serving.decoding import Decoders
from twoview.serving.guard import Guard
from twoview.serving.lookup import Lookup, Query
from twoview.serving.metrics import Metrics
from twoview.serving.settings import ServeSettings
from twoview.tools.index import Index

log = logging.getLogger(__name__)

CONNECTIONS = 512  # open at the same time; further ones are closed


def run(name: str, encoder: Encoder, index: Index, settings: ServeSettings, listener: socket.socket) -> int:
    """Serve until a signal.

    Args:
        name: name of the index, for the page.
        encoder: the network of the index, with its preprocessing.
        index: the index.
        settings: limits.
        listener: listening socket.

    Returns:
        Number of the signal; 0 without one.
    """
    size, metrics = encoder.card.image_size, Metrics()
    blank = torch.zeros(encoder.card.channels, size, size, dtype=torch.uint8)
    Lookup(encoder, index, Metrics())([Query(blank, settings.k)])  # slow the first time, and fails if anything does
    with Decoders(encoder.preprocess.plain, settings.max_pixels, settings.timeout_s) as decoders:
        service = Service(name, Lookup(encoder, index, metrics), decoders, settings)
        app = Guard(create_app(service), metrics, listener.getsockname()[0], (settings.host, *settings.hosts))
        server = uvicorn.Server(_config(app, settings))
        with _stopped_by_signals(server) as received:
            log.info("serve: %d images of %s at %s; stop by Ctrl-C", len(index), name, _url(listener))
            server.run(sockets=[listener])
    return received[-1] if received else 0


def _config(app: Any, settings: ServeSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # Upload, decoding and waiting for it have their own limits before.
        timeout_graceful_shutdown=math.ceil(4 * settings.timeout_s),
    )


class BoundedProtocol(H11Protocol):
    """A connection that is closed when no answer is completed within its ``timeout_graceful_shutdown``.

    uvicorn alone waits forever for the headers of a request, for the rest of a body that was refused, and for a client
    that does not read.
    """

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin the time."""
        super().connection_made(transport)
        self._begin()
        if len(self.connections) > CONNECTIONS:
            transport.abort()

    def on_response_complete(self) -> None:
        """Begin the time again."""
        super().on_response_complete()
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the time."""
        super().connection_lost(exc)
        if self._limit is not None:
            self._limit.cancel()

    def _begin(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
        self._limit = self.loop.call_later(self.config.timeout_graceful_shutdown or 0, self.transport.abort)


@contextlib.contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[list[int]]:
    """Note the signals that stop a server; uvicorn raises those again that it has received."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        server.should_exit = True

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
