"""The body of a request, read within limits of size, memory and time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from twoview.serving.decoder import ADVICE, FORM
from twoview.serving.settings import BODIES, UPLOADING, ServeSettings

FRAME = 2**16  # bytes of a form besides the image
# A client that is still sending may not see the answer: of what is too large, this many times the limit is read and
# discarded before.
DISCARDED = 4


class Slots:
    """Places of which a limited number is taken at the same time.

    Args:
        count: number of places.
    """

    def __init__(self, count: int) -> None:
        self.count, self.taken = count, 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Take a place until the end of the block.

        Raises:
            HTTPException: 503 if there is none.
        """
        if self.taken >= self.count:
            raise busy()
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Uploads:
    """Reads the bodies of requests, and limits how many bytes of all of them are in memory.

    Args:
        settings: limits.

    Attributes:
        bytes: number of bytes that are in memory.
        slots: uploads that are being received.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.limit, self.timeout_s = settings.upload_bytes, settings.timeout_s
        self.bytes, self.slots = 0, Slots(UPLOADING * settings.concurrency)

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[tuple[bytes, bytearray]]:
        """Yield content type and body of a request, which counts as being in memory until the end of the block.

        Raises:
            HTTPException: 400 if the client is gone, 408 if the upload is too slow, 413 if it is too large, 415 if the
                content has another type, 503 if there are too many uploads.
        """
        content_type = request.headers.get("content-type", "").strip()
        kind = content_type.partition(";")[0].strip().lower()
        form = kind.encode() == FORM
        if not (form or kind in ("", "application/octet-stream") or kind.startswith("image/")):
            raise HTTPException(415, f"Content-Type {kind[:80]!r} is not accepted; {ADVICE}")
        body = bytearray()
        try:
            with self.slots.one():
                await self._receive(request, body, self.limit + (FRAME if form else 0))
            # The type is case-insensitive, the boundary after it is not.
            yield kind.encode() + content_type[len(kind) :].encode("latin-1"), body
        finally:
            self.bytes -= len(body)

    async def _receive(self, request: Request, body: bytearray, limit: int) -> None:
        received, declared = 0, request.headers.get("content-length", "")
        size = int(declared) if declared.isdigit() else 0
        waits = "expect" in request.headers  # the client sends nothing before the server has agreed
        try:
            async with asyncio.timeout(self.timeout_s):
                if size > (limit if waits else DISCARDED * limit):
                    raise self._too_large()
                async for chunk in request.stream():
                    received += len(chunk)
                    if max(size, received) <= limit:
                        if self.bytes + len(chunk) > BODIES * self.limit:
                            raise busy()
                        body += chunk
                        self.bytes += len(chunk)
                    elif received > DISCARDED * limit:
                        break
            if max(size, received) > limit:
                raise self._too_large()
        except TimeoutError as error:
            message = (
                f"the upload took more than timeout_s={self.timeout_s:g}; send a smaller image, or raise timeout_s"
            )
            raise HTTPException(408, message, {"Connection": "close"}) from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the connection was closed before the end of the upload") from error

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the image is larger than max_upload={self.limit} bytes; send a smaller one")


def busy() -> HTTPException:
    """The answer to a request above a limit on what is done at the same time."""
    return HTTPException(503, "the server is busy; try again", {"Retry-After": "1"})
