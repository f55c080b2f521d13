"""The HTTP endpoints of a server."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from twoview.serving.batching import Batcher
from twoview.serving.decoding import Decoders
from twoview.serving.lookup import Lookup, Query
from twoview.serving.settings import MAX_K, ServeSettings
from twoview.serving.uploads import Slots, Uploads, busy

PAGE = Path(__file__).parent / "page"
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class Service:
    """What the endpoints share: limits, decoders, and the batches of the network.

    Args:
        name: name of the index, for the page.
        lookup: network and index.
        decoders: processes that decode images.
        settings: limits.
    """

    def __init__(self, name: str, lookup: Lookup, decoders: Decoders, settings: ServeSettings) -> None:
        self.lookup, self.decoders, self.settings = lookup, decoders, settings
        self.slots, self.uploads = Slots(settings.concurrency), Uploads(settings)
        self.batches: Batcher[Query, dict[str, Any]]
        self.batches = Batcher(lookup, settings.max_batch, settings.max_wait_ms / 1000)
        index = lookup.index
        self.paths, self.ids = index.paths, index.ids
        self.facts = {
            "index": name,
            "images": len(index),
            "kind": index.kind,
            "dim": index.dim,
            "checkpoint": index.checkpoint,
            "k": settings.k,
            "max_upload": settings.upload_bytes,
        }
        for figure, text, value in (
            ("index_images", "Images in the index.", lambda: len(self.ids)),
            ("working", "Images that are worked on or wait for it.", lambda: self.slots.taken),
            ("uploading", "Uploads that are being received.", lambda: self.uploads.slots.taken),
            ("upload_bytes", "Bytes of uploads in memory.", lambda: self.uploads.bytes),
            ("decoders_killed", "Processes killed since decoding took too long.", lambda: decoders.killed),
            ("decoders_ended", "Processes that ended while decoding.", lambda: decoders.ended),
        ):
            lookup.metrics.gauge(figure, text, value)

    async def answer(self, request: Request, k: int) -> dict[str, Any]:
        """Return the vector of the image in a request (k = 0), or its k neighbors.

        Raises:
            HTTPException: if there is no image within the limits, or the server is busy.
        """
        async with self.uploads.body(request) as (content_type, body), self.work():
            pixels = await self.decoders.pixels(content_type, body)
            return await self.batches.result(Query(pixels, k))

    @contextlib.asynccontextmanager
    async def work(self) -> AsyncIterator[None]:
        """Take a place for one image until the end of the block, which is given up when it takes too long.

        Raises:
            HTTPException: 503 if there is no place, or it takes too long.
        """
        with self.slots.one():
            try:
                async with asyncio.timeout(2 * self.settings.timeout_s):
                    yield
            except TimeoutError as error:
                raise busy() from error

    def path_of(self, number: int) -> str:
        """Return the path of an entry of the index.

        Raises:
            HTTPException: 404 if there is none.
        """
        rows = (self.ids == number).nonzero().flatten().tolist() if number < 2**62 else []
        if not rows:
            raise HTTPException(404, f"there is no entry {number}")
        return str(self.paths[rows[0]])


def create_app(service: Service) -> FastAPI:
    """Create the application.

    Args:
        service: what answers the requests; its batches run while the application does.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.batches.started():
            yield

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.post("/embed")
    async def embed(request: Request) -> Response:
        return _json(await service.answer(request, 0))

    @app.post("/search")
    async def search(request: Request) -> Response:
        return _json(await service.answer(request, _wanted(request, service.settings.k)))

    @app.get("/thumbnails/{number:int}")
    async def thumbnail(number: int) -> Response:
        path = service.path_of(number)
        async with service.work():
            try:
                return Response(await service.decoders.thumbnail(path), media_type="image/jpeg")
            except HTTPException as error:
                raise HTTPException(404, f"there is no picture of entry {number}") from error

    @app.get("/health")
    async def health() -> Response:
        running = service.batches.running
        return _json({"status": "ok" if running else "stopped", **service.facts}, 200 if running else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.lookup.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _json({"detail": "the server failed; its log says why"}, 500)

    for file in PAGE.iterdir():
        _add_file(app, file)
    return app


def _add_file(app: FastAPI, file: Path) -> None:
    """Serve a file of the page, as it is now."""
    content, media_type = file.read_bytes(), TYPES[file.suffix.removeprefix(".")]

    @app.get("/" if file.stem == "index" else f"/{file.name}")
    async def page() -> Response:
        return Response(content, media_type=media_type)


def _wanted(request: Request, default: int) -> int:
    """Number of neighbors in the query of a request."""
    text = request.query_params.get("k", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= MAX_K):
        raise HTTPException(400, f"k={text[:20]}: give a whole number from 1 to {MAX_K}")
    return int(text)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    """Answer with JSON in ASCII: paths may hold bytes that are no text."""
    return Response(json.dumps(content), status, media_type="application/json")
