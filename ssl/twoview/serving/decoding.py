"""Decoding of uploaded images in other processes, each of which is replaced when it hangs or ends."""

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor

from twoview.errors import UserError
from twoview.serving import decoder

# Two are enough for one network on a CPU, and a hostile image keeps one of them busy.
PROCESSES = max(2, min(8, (os.cpu_count() or 1) // 2))
LARGEST_ANSWER = 2**26  # bytes


class Decoders:
    """Processes that decode images, used as a context manager.

    The processes are forked from a server process that has imported torch once, so that a killed one is replaced within
    milliseconds.

    Args:
        preprocess: arguments of :class:`twoview.data.Preprocess`.
        max_pixels: number of pixels above which an image is refused.
        timeout_s: seconds after which a process that has not answered is killed.
        count: number of processes.

    Attributes:
        killed: number of processes that were killed after ``timeout_s``.
        ended: number of processes that ended by themselves, such as by a fault in a library.
    """

    def __init__(
        self, preprocess: Mapping[str, Any], max_pixels: int, timeout_s: float, count: int = PROCESSES
    ) -> None:
        self.shape = (len(preprocess["mean"]), preprocess["image_size"], preprocess["image_size"])
        self.timeout_s, self.killed, self.ended = timeout_s, 0, 0
        self._processes = [_Process(preprocess, max_pixels) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count, "decoder")
        self._idle: asyncio.LifoQueue[_Process] = asyncio.LifoQueue()
        # Large images take seconds: one process is left for the others.
        self._all, self._large = asyncio.Semaphore(count), asyncio.Semaphore(max(1, count - 1))

    def __enter__(self) -> "Decoders":
        advice = 'in a script, call serve below if __name__ == "__main__":'
        for process in self._processes:
            if process.ask(decoder.UPLOAD + b"\n") is None:  # the answer is that this is no image
                self.__exit__()
                raise UserError(f"serve: the processes that decode images end at once; {advice}")
            self._idle.put_nowait(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.stop()
        self._threads.shutdown()

    async def pixels(self, content_type: bytes, body: bytes | bytearray) -> Tensor:
        """Decode and preprocess the image in the body of a request.

        Args:
            content_type: header of the request, without line breaks.
            body: bytes of an image file, or a multipart form.

        Returns:
            uint8 ``[C, image_size, image_size]``, before normalization.

        Raises:
            HTTPException: 400 if there is none, 413 if it is too large, 415 if it is no image, 422 if it cannot be
                decoded in time, or not at all.
        """
        answer = await self._answer(decoder.UPLOAD, content_type, b"\n", body)
        return torch.frombuffer(bytearray(answer), dtype=torch.uint8).view(self.shape)

    async def thumbnail(self, path: str) -> bytes:
        """Return a small JPEG of a file, or raise HTTPException as :meth:`pixels` does."""
        return await self._answer(decoder.PATH, os.fsencode(path))

    async def _answer(self, kind: bytes, *content: bytes | bytearray) -> bytes:
        reply = await self._reply(b"".join([kind, *content]), self._all)
        if reply[:1] == decoder.LARGER:
            reply = await self._reply(b"".join([kind.upper(), *content]), self._large)
        if reply[:1] != decoder.DONE:
            raise HTTPException(int(reply[1:4]), reply[4:].decode())
        return reply[1:]

    async def _reply(self, request: bytes, places: asyncio.Semaphore) -> bytes:
        await places.acquire()
        try:
            process = await self._idle.get()
        except BaseException:
            places.release()
            raise
        # A request that is given up leaves its process and its place taken until the process has answered.
        return await asyncio.shield(asyncio.ensure_future(self._asked(process, request, places)))

    async def _asked(self, process: "_Process", request: bytes, places: asyncio.Semaphore) -> bytes:
        try:
            for _attempt in range(2):  # a process may have ended before the request
                future = asyncio.get_running_loop().run_in_executor(self._threads, process.ask, request)
                done, _ = await asyncio.wait([future], timeout=self.timeout_s)
                if not done:
                    self.killed += 1
                    process.kill()  # which ends the thread that waits for it
                    await future
                    message = f"decoding the image took more than timeout_s={self.timeout_s:g}; send a smaller one"
                    raise HTTPException(422, message)
                reply = await future
                if reply is not None:
                    return reply
                self.ended += 1
            raise HTTPException(422, "the process that decoded the image ended; send it in another form")
        finally:
            self._idle.put_nowait(process)
            places.release()


class _Process:
    """One process, which answers one request at a time."""

    def __init__(self, *arguments: Any) -> None:
        try:
            self._context: Any = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload([decoder.__name__])
        except ValueError:  # not on Windows
            self._context = multiprocessing.get_context("spawn")
        self._arguments, self._stopped, self._lock = arguments, False, threading.Lock()
        self._start()

    def _start(self) -> None:
        self._pipe, other = multiprocessing.Pipe()
        self._process = self._context.Process(target=decoder.run, args=(other, *self._arguments), daemon=True)
        self._process.start()
        other.close()

    def ask(self, request: bytes) -> bytes | None:
        """Return the answer to a request; None if the process has ended, and was replaced by another one."""
        try:
            self._pipe.send_bytes(request)
            reply: bytes = self._pipe.recv_bytes(LARGEST_ANSWER)
            return reply
        except (EOFError, OSError):
            with self._lock:
                if not self._stopped:
                    self._end()
                    self._start()
            return None

    def kill(self) -> None:
        """End the process; :meth:`ask` in another thread then returns."""
        self._process.kill()

    def stop(self) -> None:
        """End the process for good."""
        with self._lock:
            self._stopped = True
            self._end()

    def _end(self) -> None:
        self.kill()
        self._process.join()
        self._pipe.close()
