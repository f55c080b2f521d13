"""Failures of the system around a run: files and a standard output that cannot be written."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from hydra._internal import utils as hydra_internals

from twoview.errors import UserError, continue_with

_FOLDER = "choose another folder as hydra.run.dir=FOLDER"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free disk space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), f"make it writable, or {_FOLDER}"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP), _FOLDER),
    errno.ENOENT: f"it has been removed, or cannot be created; {_FOLDER}",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def system_error(error: BaseException, folder: str | None = None) -> UserError | None:
    """A failure of the operating system as a sentence.

    Args:
        error: an exception; it, or what it was raised from, may be such a failure.
        folder: folder of a pretraining run, whose last checkpoint is named; None where nothing can be resumed.

    Returns:
        The sentence with the file, the failure, and what to do; None for any other exception.
    """
    from twoview.devices import memory_error  # here, so that a mistyped knob does not wait for torch

    memory = memory_error(error, "out of memory; try a smaller data.batch_size, data.image_size or backbone.name")
    if memory is not None:
        return memory
    current: BaseException | None = error
    while current is not None and not (isinstance(current, OSError) and current.errno is not None):
        current = current.__cause__
    if current is None:
        return None
    parts = [f"{current.filename or folder or 'a file'}: {current.strerror}"]
    if current.errno in _ADVICE:
        parts.append(_ADVICE[current.errno])
    if folder is not None:
        from twoview.loading import LAST

        saved = (Path(folder) / "checkpoints" / LAST).is_file()
        parts.append(continue_with(folder) if saved else "no checkpoint had been written")
    return UserError("; ".join(parts))


@contextlib.contextmanager
def propagated() -> Iterator[None]:
    """Let exceptions leave ``hydra.main``, which prints the traceback of each and exits."""
    original = hydra_internals.run_and_report  # Hydra 1.3 has no public way to turn it off
    hydra_internals.run_and_report = lambda func: func()
    try:
        yield
    finally:
        hydra_internals.run_and_report = original


class Output:
    """A standard output whose failures do not end a run: what cannot be written is discarded.

    Args:
        stream: the present ``sys.stdout``; None if it is closed.

    Attributes:
        error: the first failure.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        with self._watched():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._watched():
            self._stream.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            # What is still buffered goes nowhere, instead of failing again at the end of the process.
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@contextlib.contextmanager
def watched_output() -> Iterator[Output]:
    """Replace ``sys.stdout`` by an :class:`Output`, and restore it."""
    before, output = sys.stdout, Output(sys.stdout)
    sys.stdout = cast(Any, output)
    try:
        yield output
    finally:
        output.flush()
        sys.stdout = before
