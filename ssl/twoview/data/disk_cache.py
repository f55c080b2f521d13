"""Cache of decoded images in a file, which is mapped into memory and indexed like a tensor."""

import contextlib
import errno
import hashlib
import logging
import math
import mmap
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from twoview.data.canvases import GrowingCanvases, Storage, image_statistics
from twoview.files import open_regular, remove_left_over, write_atomically
from twoview.torch_files import load_torch

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when decoding or the files change: caches of other versions are not used
SAMPLE = 16  # number of images whose statistics are compared when a cache is opened
KEPT_FREE = 10_000_000_000  # bytes of the disk that stay free, or a tenth of the disk if that is less
STALE = 3600.0  # seconds after which an unfinished file of another cache is taken for that of a killed process


def default_folder() -> Path:
    """Folder of caches: ``twoview`` in ``XDG_CACHE_HOME``, or in ``~/.cache``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "twoview"


def files_fingerprint(paths: Iterable[str], *parts: bytes) -> str:
    """Hash the absolute paths, sizes and times of modification of files, and further bytes; nothing is opened."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(os.fsencode(os.path.abspath(path)) + f"\0{state}\0".encode())
    for part in parts:
        digest.update(hashlib.blake2b(part).digest())
    return digest.hexdigest()


class Contents(NamedTuple):
    """Description of the N readable images of a source, in its order.

    Attributes:
        side: height and width S of their canvases in pixels.
        sizes: int64 ``[N, 2]``, height and width of each image; None if every image fills its canvas.
        statistics: float64 ``[N, 3, C]``, see :func:`twoview.data.canvases.image_statistics`.
        unreadable: int64 ``[B]``, positions in the source of the images that cannot be read, ascending.
        reasons: why each of these cannot be read.
    """

    side: int
    sizes: Tensor | None
    statistics: Tensor
    unreadable: Tensor
    reasons: list[str]


class DiskCache:
    """Decoded images of one source in two files: the pixels, and a description that is written last.

    Args:
        folder: folder of caches; created when a cache is written.
        fingerprint: hash of the source.
        count: number of images of the source.
        channels: number of channels C.
        limit: largest height and width of the decoded images in pixels.

    Attributes:
        pixels_file: path of the pixels, ``N * C * S * S`` bytes.
        description_file: path of everything else.
        needed: largest possible size of the pixels in bytes.
    """

    def __init__(self, folder: Path, fingerprint: str, count: int, channels: int, limit: int) -> None:
        self.folder, self.count, self.channels, self.limit = folder, count, channels, limit
        key = repr((FORMAT, fingerprint, count, channels, limit)).encode()
        self.name = hashlib.blake2b(key, digest_size=16).hexdigest()
        self.pixels_file, self.description_file = folder / f"{self.name}.pixels", folder / f"{self.name}.pt"
        self.needed = count * channels * limit**2

    def has_room(self, knob: str) -> bool:
        """Log how large the cache may become, and return whether 10 GB, or a tenth of a smaller disk, stay free."""
        place = self.folder.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        usage = shutil.disk_usage(place)
        kept = min(usage.total / 10, KEPT_FREE)
        needed, free = f"{self.needed / 1e9:,.1f} GB", f"{usage.free / 1e9:,.1f} GB"
        if self.needed > usage.free - kept:
            message = "data: %s is not cached: up to %s in %s would leave less than %.1f GB of the disk free (now %s)"
            log.info(message, knob, needed, self.folder, kept / 1e9, free)
            return False
        message = "data: %s is decoded once into %s (up to %s, %s are free); data.cache=false decodes in every epoch"
        log.info(message, knob, self.pixels_file, needed, free)
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait for another process that writes the same cache, then remove what killed processes left.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(self.folder / f"{self.name}.lock", flags, 0o644), "rb") as file:
            alone = False
            with contextlib.suppress(ImportError, OSError):  # Windows; file systems without locks
                import fcntl

                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader processes do not inherit this lock
                except BlockingIOError:
                    log.info("data: waiting for another process, which writes %s", self.pixels_file)
                    fcntl.lockf(file, fcntl.LOCK_EX)
                alone = True
            if alone:
                remove_left_over(self.folder, prefix=self.name)
            remove_left_over(self.folder, seconds=STALE)
            yield

    def load(self) -> tuple[Contents, Tensor] | None:
        """Return the description, and the pixels uint8 ``[N, C, S, S]`` mapped into memory.

        None if there is no cache, or it is damaged.
        """
        if not self.description_file.exists():
            return None
        try:
            return self._load()
        except Exception as error:  # torch.load raises many classes
            log.warning("data: %s is damaged (%s); decoding the images again", self.pixels_file, error)
            return None

    def write(self, fill: Callable[[GrowingCanvases], object]) -> None:
        """Write the pixels, which are used once :meth:`describe` has been called too.

        Args:
            fill: function that adds all readable images, in their order.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """

        def content(handle: BinaryIO) -> None:
            with open(handle.name, "r+b", buffering=0) as file:
                canvases = GrowingCanvases(_storage(file.fileno()), self.channels, self.limit)
                fill(canvases)
                side = canvases.finish()
                os.truncate(file.fileno(), canvases.count * self.channels * side * side)

        write_atomically(self.pixels_file, content)

    def describe(self, contents: Contents) -> None:
        """Write the description, which completes the cache.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        write_atomically(self.description_file, lambda file: torch.save(contents._asdict(), file))

    def _load(self) -> tuple[Contents, Tensor]:
        found = load_torch(self.description_file)
        side, names = found["side"], ("sizes", "statistics", "unreadable", "reasons")
        sizes, statistics, unreadable, reasons = (found[name] for name in names)
        number = self.count - len(reasons)
        _require(isinstance(side, int) and 1 <= side <= self.limit, "size of the canvases")
        _require(number > 0 and all(isinstance(reason, str) for reason in reasons), "reasons")
        _require(_is(unreadable, torch.int64, len(reasons)), "unreadable images")
        _require(sorted(set(unreadable.tolist()) & set(range(self.count))) == unreadable.tolist(), "unreadable images")
        _require(_is(statistics, torch.float64, number, 3, self.channels), "statistics")
        _require(bool(((statistics >= 0) & (statistics <= 1)).all()), "statistics")
        if sizes is not None:
            _require(_is(sizes, torch.int64, number, 2), "sizes")
            _require(1 <= int(sizes.min()) <= int(sizes.max()) <= side, "sizes")
        pixels = _mapped(self.pixels_file, (number, self.channels, side, side))
        some = torch.linspace(0, number - 1, min(SAMPLE, number)).long()
        again = image_statistics(pixels[some], None if sizes is None else sizes[some])
        _require(torch.allclose(again, statistics[some], rtol=0, atol=1e-9), "pixels")
        return Contents(side, sizes, statistics, unreadable, list(reasons)), pixels


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"wrong {what}")


def _is(found: Any, dtype: torch.dtype, *shape: int) -> bool:
    return isinstance(found, Tensor) and found.dtype == dtype and found.shape == shape


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Map a file into memory as uint8 tensor, which is not to be written to."""
    with open_regular(path) as file:
        _require(os.fstat(file.fileno()).st_size == math.prod(shape), "size of the file")
        # Linux would count a mapping that can be written, even a private one, as memory.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.frombuffer(mapped, dtype=torch.uint8).view(shape)


def _storage(file: int) -> Storage:
    """Storage in an open file. Writing to a mapped file on a full disk would end the process by a signal."""

    def read(start: int, stop: int) -> Tensor:
        parts = bytearray()
        while len(parts) < stop - start:
            part = os.pread(file, stop - start - len(parts), start + len(parts))
            if not part:
                raise OSError(errno.EIO, "the file is shorter than what was written")
            parts += part
        return torch.frombuffer(parts, dtype=torch.uint8)

    def write(start: int, values: Tensor) -> None:
        rest = memoryview(values.contiguous().numpy().data).cast("B")
        while rest:
            written = os.pwrite(file, rest, start)
            rest, start = rest[written:], start + written

    return Storage(read, write)
