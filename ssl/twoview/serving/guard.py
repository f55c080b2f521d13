"""What holds for every request: which names and origins are accepted, and the headers of every answer."""

import ipaddress
import json
import socket
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twoview.serving.metrics import Metrics
from twoview.serving.settings import is_loopback

# Scripts, styles and pictures of this server only; blob: is the dropped picture.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI application around another one, which refuses requests that a page of another site may have sent.

    A page of another site whose name leads to this machine (DNS rebinding) sends that name in the header Host. Accepted
    are "localhost" and addresses of the loopback interface if the server can be reached from this machine only.
    Otherwise any IP address is accepted, since the owner of a name cannot choose it, and the names of this machine.

    Args:
        app: the application.
        metrics: counts the requests.
        host: address that the server listens on.
        hosts: further accepted names.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, host: str, hosts: Sequence[str] = ()) -> None:
        self.app, self.metrics, self.local = app, metrics, is_loopback(host)
        own = () if self.local else (socket.gethostname(), socket.getfqdn())
        self.names = {name.lower().rstrip(".") for name in ("localhost", host, *own, *hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it to the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            refusal = self._refusal(Headers(scope=scope))
            if refusal is None:
                await self.app(scope, receive, with_headers)
            else:
                await _answer(with_headers, *refusal)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        """Status and sentence for a request that is refused."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._accepts(host):
            return (
                421,
                f"the name {host[:80]!r} is not one of this server; use its address, or start it with hosts=[NAME]",
            )
        # Links to the page are allowed.
        embedded = headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate"
        if embedded or (origin is not None and _place(origin) != host.lower()):
            return 403, "requests of pages of other sites are refused"
        return None

    def _accepts(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        try:
            address: Any = ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return not self.local or address.is_loopback or name in self.names


def _place(origin: str) -> str:
    """Host and port of an origin; empty for an opaque one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
