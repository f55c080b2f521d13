"""Serve an index over HTTP."""

import errno
import logging
import signal
import socket
from importlib.util import find_spec
from pathlib import Path

from twoview.devices import pick_device
from twoview.errors import Interrupted, UserError, require
from twoview.serving.settings import ServeSettings, is_loopback
from twoview.tools.searching import network_of_index, open_index

log = logging.getLogger(__name__)

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
_ADVICE = {
    errno.EADDRINUSE: "is used by another program; choose another one, or port=0 for any free one",
    errno.EACCES: "may not be used by this user; choose one from 1024",
}


def serve(
    index: str | Path,
    checkpoint: str | Path | None = None,
    settings: ServeSettings = ServeSettings(),  # noqa: B008 (frozen)
) -> None:
    """Answer requests for the embeddings and the neighbors of images, until the process receives SIGINT or SIGTERM.

    ``POST /embed`` and ``POST /search?k=10`` take an image and return JSON; ``GET /`` is a page on which an image is
    dropped; ``GET /health`` and ``GET /metrics`` are for monitoring.

    Args:
        index: file of an index; or a ``.parquet`` file of embeddings, which is searched exactly.
        checkpoint: network of the index, a source for :func:`twoview.load`; None for the file that the index names.
        settings: address and limits.

    Raises:
        UserError: if FastAPI is missing, the index cannot be read, the checkpoint is not that of the index, or the
            address cannot be listened on.
        Interrupted: after a signal, when the requests that were being answered are finished.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    require(not missing, f'task=serve: needs {", ".join(missing)}; pip install "twoview[serve]"')
    with listen(settings.host, settings.port) as listener:
        opened = open_index(index)
        encoder = network_of_index(opened, index, checkpoint).to(pick_device())
        from twoview.serving.running import run  # needs these packages

        received = run(Path(str(index)).name, encoder, opened, settings, listener)
    if received:
        raise Interrupted(f"{signal.Signals(received).name}: stopped", 130 if received == signal.SIGINT else 143)


def listen(host: str, port: int) -> socket.socket:
    """Open a port, so that one that is in use is found before the network is loaded.

    Raises:
        UserError: if the address cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"host={host}: is no address of this machine; choose another one") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except OSError as error:
        listener.close()
        if error.errno in _ADVICE:
            raise UserError(f"port={port}: {_ADVICE[error.errno]}") from error
        raise UserError(f"host={host}: cannot be listened on ({error.strerror}); choose another one") from error
    if not is_loopback(str(address[0])):
        log.warning("serve: host=%s can be reached from other machines, and there is no authentication", host)
    return listener
