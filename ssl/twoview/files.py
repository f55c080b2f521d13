"""Atomic writing of files, so that a killed process never leaves a partly written file; reading of regular files.

Also a lock on a folder.
"""

import contextlib
import csv
import ctypes
import errno
import io
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from twoview.errors import UserError

LOCK = "lock"  # name of the file in a folder that is locked


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. FIFOs, devices and sockets, on which reading could block, are refused.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    nonblocking = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | nonblocking))  # noqa: SIM115 (returned)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
        ValueError: other content.
    """
    with open_regular(path) as file:
        try:
            found = json.load(file)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the complete rows of a CSV file by the names of their columns; a row cut off at the end is left out.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
        ValueError: other content.
    """
    with open_regular(path) as file:
        content = file.read()
    text = content[: content.rfind(b"\n") + 1].decode()
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return [row for row in rows if None not in row and None not in row.values()]


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows as CSV by :func:`write_atomically`; the first row holds the names of the columns.

    Cells are written so that no spreadsheet takes a text for a formula: an apostrophe precedes a text, other than a
    number, that begins with one of ``= + - @``, and control characters are escaped.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_cell(value) for value in row] for row in rows)
    write_atomically(path, text.getvalue())


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError):
        float(value)
        return value
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def remove_left_over(*folders: Path, seconds: float = 0, prefix: str = "") -> None:
    """Remove temporary files of :func:`write_atomically` that killed processes left.

    Args:
        folders: folders that are searched, but not the folders in them.
        seconds: younger files are kept, where other processes may write.
        prefix: start of the names, without the special characters of a glob pattern; other files are kept.
    """
    for file in (file for folder in folders for file in folder.glob(f"{prefix}*.tmp")):
        with contextlib.suppress(OSError):
            status = file.lstat()
            ours = re.fullmatch(r".+\.\d+\.tmp", file.name) and stat.S_ISREG(status.st_mode)
            if ours and time.time() - status.st_mtime >= seconds:
                file.unlink()


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes of this machine have left beside a path that they were writing.

    These are the temporary files of :func:`write_atomically` and folders of :func:`write_folder_atomically` for this
    path. Those of processes that still run are kept.

    Args:
        path: path of the file or folder that is going to be written.
    """
    try:
        entries = list(path.parent.iterdir()) if os.name == "posix" else []
    except OSError:
        return
    for entry in entries:
        found = re.fullmatch(re.escape(path.name) + r"\.(\d+)\.tmp", entry.name)
        if found is None or _may_be_running(int(found[1])) or entry.is_symlink():
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()


def _may_be_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends no signal
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def exclusive(folder: Path, *below: Path) -> Iterator[None]:
    """Lock a folder against other processes, if fcntl exists, and remove temporary files of killed writes.

    Args:
        folder: the folder; created if missing.
        below: further folders in it from which temporary files are removed.

    Raises:
        UserError: if the folder cannot be written or another process has locked the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Neither truncated nor followed if it is a link; a FIFO does not block.
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another folder") from error
    with open(handle, "rb") as file:
        try:
            import fcntl  # not on Windows

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader processes do not inherit this lock
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is working in this folder; wait for it, or stop it") from error
        except (ImportError, OSError):
            pass
        remove_left_over(folder, *below)
        yield


class _File(io.FileIO):
    """Stores a failure to write instead of raising it: ``torch.save`` would turn it into a RuntimeError."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


def write_atomically(
    path: Path, content: bytes | str | Callable[[BinaryIO], object], previous: Path | None = None
) -> None:
    """Write a file under a temporary name in the same folder, sync it to disk, and rename it.

    Args:
        path: path of the file; missing parent folders are created.
        content: bytes; or text, encoded as UTF-8, in which characters that UTF-8 cannot encode are escaped; or a
            function that writes to the open binary file.
        previous: path that an existing file at ``path`` is renamed to; None to overwrite the existing file.

    Raises:
        OSError: if the folder cannot be written or the disk is full; ``path`` is then unchanged.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _File(temporary, "wb") as raw, io.BufferedWriter(raw) as file:
            if callable(content):
                content(file)
            else:
                file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
            file.flush()
            if raw.failure is not None:
                raise OSError(raw.failure.errno, raw.failure.strerror, str(path)) from raw.failure
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder_atomically(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``, and rename it to ``path`` once the block has ended without an exception.

    Files in it are written by :func:`write_atomically`, which syncs them. A folder at ``path`` is replaced with all
    that is in it: by one exchange of the two names on Linux, elsewhere by two renames. Folders that killed processes
    have left are removed before.

    Args:
        path: path of the folder; missing parent folders are created.

    Raises:
        OSError: if the folder cannot be written or renamed; ``path`` is then unchanged.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with this id
        remove_unfinished(path)
        temporary.mkdir(parents=True)
        yield temporary
        if not _exchange(temporary, path):
            _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Exchange the names of two folders in one step; False if there is no second one, or the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0


def _replace(new: Path, path: Path) -> None:
    old = new.with_name(f"{new.name}.old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
