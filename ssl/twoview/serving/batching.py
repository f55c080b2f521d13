"""Batches of requests: what arrives within some milliseconds is computed together, in one thread."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items of several tasks, computes them together, and returns to each task the result of its item.

    While a batch is computed, the next one is collected.

    Args:
        compute: function of a list of 1 to ``max_batch`` items that returns as many results, called in one thread.
        max_batch: largest number of items of a batch.
        max_wait_s: seconds that the first item of a batch waits for others.
    """

    def __init__(self, compute: Callable[[list[Item]], Sequence[Result]], max_batch: int, max_wait_s: float) -> None:
        self.compute, self.max_batch, self.max_wait_s = compute, max_batch, max_wait_s
        self._waiting: asyncio.Queue[tuple[Item, asyncio.Future[Result]]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether items are being computed."""
        return self._task is not None and not self._task.done()

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        """Compute batches until the end of the block."""
        with ThreadPoolExecutor(1, "encoder") as thread:
            self._task = asyncio.create_task(self._run(thread))
            try:
                yield
            finally:
                self._task.cancel()

    async def result(self, item: Item) -> Result:
        """Return the result of an item.

        Raises:
            Exception: what ``compute`` has raised for its batch.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((item, future))
        return await future

    async def _run(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Requests that were given up have cancelled their futures.
            batch = [(item, future) for item, future in await self._collected() if not future.done()]
            if not batch:
                continue
            try:
                results = await loop.run_in_executor(thread, self.compute, [item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    async def _collected(self) -> list[tuple[Item, "asyncio.Future[Result]"]]:
        batch = [await self._waiting.get()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.max_wait_s):
                while len(batch) < self.max_batch:
                    batch.append(await self._waiting.get())
        return batch
