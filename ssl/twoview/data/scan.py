"""Read all images of a split once before training: find damaged files, and keep the pixels in memory or in a file."""

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from twoview.data.canvases import GrowingCanvases, Storage, image_statistics, on_canvases
from twoview.data.decode import Shape, whole_and_shape
from twoview.data.disk_cache import Contents, DiskCache
from twoview.data.images import Images, LazyImages, TensorImages
from twoview.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 256  # largest number of images that a worker returns at a time
CHUNK_BYTES = 2**23  # largest size in bytes of the pixels that a worker returns at a time
Broken = list[tuple[str, str]]  # name of each image that cannot be read, and the reason


class _Chunk(NamedTuple):
    """Result of reading a chunk of images; ``pixels`` are canvases of the readable images, or nothing.

    The values are arrays, because each tensor would keep a shared memory file open.
    """

    pixels: np.ndarray | None
    sizes: np.ndarray
    statistics: np.ndarray
    unreadable: list[int]
    reasons: list[str]
    kinds: Counter[str]
    shapes: set[Shape]


def _identity(chunk: Any) -> Any:
    return chunk


class _Scan(Dataset[_Chunk]):
    def __init__(self, images: LazyImages, keep: bool) -> None:
        self.images, self.keep = images, keep

    def __getitem__(self, positions: Any) -> _Chunk:
        images, decoded = self.images, list[Tensor]()
        unreadable, reasons = list[int](), list[str]()
        kinds, shapes = Counter[str](), set[Shape]()
        for position in torch.as_tensor(positions).tolist():
            try:
                item = images.source[position]
                one, shape = whole_and_shape(item, images.size, images.channels)
            except MemoryError:
                raise
            except Exception as error:
                unreadable.append(position)
                reasons.append(f"{type(error).__name__}: {error}")
            else:
                decoded.append(one)
                shapes.add(shape)
                kinds["packed" if isinstance(item, bytes) else Path(item).suffix.lower()] += 1
        side = max((max(image.shape[1:]) for image in decoded), default=1)
        pixels, sizes = on_canvases(decoded, images.channels, side)
        statistics = image_statistics(pixels, sizes).numpy()
        kept = pixels.numpy() if self.keep else None
        return _Chunk(kept, sizes.numpy(), statistics, unreadable, reasons, kinds, shapes)


class _Found:
    """Everything about the images but their pixels. Arrays are allocated once, since many would fragment the memory."""

    def __init__(self, images: LazyImages) -> None:
        n = len(images)
        self.images, self.readable = images, 0
        self.sizes = torch.empty(n, 2, dtype=torch.int64)
        self.statistics = torch.empty(n, 3, images.channels, dtype=torch.float64)
        self.unreadable, self.reasons = list[int](), list[str]()
        self.kinds, self.shapes = Counter[str](), set[Shape]()

    def add(self, chunk: _Chunk) -> None:
        start, self.readable = self.readable, self.readable + len(chunk.sizes)
        self.sizes[start : self.readable] = torch.from_numpy(chunk.sizes)
        self.statistics[start : self.readable] = torch.from_numpy(chunk.statistics)
        self.unreadable += chunk.unreadable
        self.reasons += chunk.reasons
        self.kinds += chunk.kinds
        self.shapes |= chunk.shapes

    def fill(self, chunks: Iterable[_Chunk], canvases: GrowingCanvases) -> None:
        """Take chunks, and write their pixels."""
        for chunk in chunks:
            self.add(chunk)
            if len(chunk.sizes):
                assert chunk.pixels is not None
                canvases.add(torch.from_numpy(chunk.pixels))

    def check(self, max_broken: float, knob: str) -> None:
        """Check that all images have been read, and raise :class:`UserError` if too many cannot be."""
        lost = len(self.images) - self.readable - len(self.unreadable)
        if lost:
            raise RuntimeError(f"{knob}: {lost} images were lost by a loader process")
        _check_broken(self.images, self.unreadable, self.reasons, max_broken, knob)

    def contents(self) -> Contents:
        """Description of all images, at least one of which is readable."""
        sizes, statistics = self.sizes[: self.readable], self.statistics[: self.readable]
        side, full = int(sizes.max()), int(sizes.min()) == int(sizes.max())
        unreadable = torch.tensor(self.unreadable, dtype=torch.int64)
        return Contents(side, None if full else sizes, statistics, unreadable, self.reasons)

    def log(self, knob: str) -> None:
        """Describe the images."""
        heights, widths, channels = (sorted(set(values)) for values in zip(*self.shapes, strict=True))
        high, wide = (str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in (heights, widths))
        sizes = f"{high} pixels high and {wide} wide, {' or '.join(map(str, channels))} channels"
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
        labels = self.images.labels
        known = len(labels[labels >= 0].unique())
        classes = f"{known} classes" if known else "no labels"
        found = f"{self.readable:,} images ({kinds})"
        log.info("data: %s has %s, %s, %s; %d broken files", knob, found, sizes, classes, len(self.unreadable))


class _Names(Sequence[str]):
    """Names of images, without a copy of all of them."""

    def __init__(self, images: LazyImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: Any) -> Any:
        return self.images.name(position)


def read_all(
    images: LazyImages, max_broken: float, knob: str, keep: bool, cache: DiskCache | None = None
) -> tuple[Images, Broken]:
    """Decode every image once, or take the images from a cache.

    Args:
        images: all images of a source, in the order of the source.
        max_broken: largest share of the images that may be unreadable, in [0, 1].
        knob: name of the knob that sets the source, for messages.
        keep: whether to keep the pixels in memory.
        cache: where the pixels are kept if they are not kept in memory; None to keep only the statistics.

    Returns:
        The readable images; and for each unreadable image, its name and the reason.

    Raises:
        UserError: if too many images are unreadable.
    """
    with contextlib.ExitStack() as lock:
        loaded, cache = (None, None) if cache is None else _open(cache, images, knob, lock)
        contents, pixels = loaded or _scan(images, max_broken, knob, keep, cache)
    broken = _check_broken(images, contents.unreadable.tolist(), contents.reasons, max_broken, knob)
    images.lost[contents.unreadable] = True
    readable = images.subset(torch.nonzero(~images.lost).flatten())
    # All images that are smaller than the limit are decoded at their own size, so the largest one is a limit too.
    readable.size, readable.full, readable.known_statistics = contents.side, contents.sizes is None, contents.statistics
    if pixels is None:
        return readable, broken
    named = [readable.name(i) for i in range(len(readable))] if keep else _Names(readable)
    held = TensorImages(pixels, readable.labels, readable.blocks, named, contents.statistics, contents.sizes)
    if not keep:
        # Processes that are started in another way than by a fork would get a copy of all pixels.
        held.rows, held.loaders = torch.arange(len(held)), images.num_workers if sys.platform == "linux" else 0
    return held, broken


def _open(
    cache: DiskCache, images: LazyImages, knob: str, lock: contextlib.ExitStack
) -> tuple[tuple[Contents, Tensor] | None, DiskCache | None]:
    """Return the content of a cache; else the cache, locked, if it can be written."""
    failure = None
    try:
        lock.enter_context(cache.locked())
    except OSError as error:
        failure = error
    loaded = cache.load()
    if loaded is not None and not any(_is_readable(images, i) for i in loaded[0].unreadable.tolist()):
        number = cache.count - len(loaded[0].reasons)
        log.info("data: %s: %s decoded images are taken from %s", knob, f"{number:,}", cache.pixels_file)
        lock.close()
        return loaded, None
    if failure is None and cache.has_room(knob):
        return None, cache
    if failure is not None:
        log.warning("data.cache=%s: cannot be written (%s)", cache.folder, failure.strerror)
    lock.close()
    return None, None


def _is_readable(images: LazyImages, position: int) -> bool:
    try:
        whole_and_shape(images.source[position], images.size, images.channels)
    except Exception:
        return False
    return True


def _scan(
    images: LazyImages, max_broken: float, knob: str, keep: bool, cache: DiskCache | None
) -> tuple[Contents, Tensor | None]:
    n, channels, size = len(images), images.channels, images.size
    positions = torch.arange(n).split(max(1, min(CHUNK, CHUNK_BYTES // (channels * size**2))))
    workers = images.num_workers if len(positions) > 4 else 0  # few images are read faster than processes start
    scan: Any = _Scan(images, keep or cache is not None)
    chunks = iter(DataLoader(scan, None, sampler=list(positions), num_workers=workers, collate_fn=_identity))
    found = _Found(images)

    def fill(canvases: GrowingCanvases) -> None:
        found.fill(chunks, canvases)
        found.check(max_broken, knob)

    if keep:
        flat = torch.empty(n * channels * size**2, dtype=torch.uint8)  # memory is taken as it is written to
        canvases = GrowingCanvases(Storage.in_memory(flat), channels, size)
        fill(canvases)
        side = canvases.finish()
        pixels = flat[: canvases.count * channels * side**2].view(-1, channels, side, side)
        found.log(knob)
        return found.contents(), pixels
    if cache is not None:
        try:
            cache.write(fill)
            cache.describe(found.contents())
        except OSError as error:
            message = "data.cache=%s: cannot be written (%s); images are decoded in every epoch"
            log.warning(message, cache.folder, error.strerror)
            cache = None
    for chunk in chunks:  # all, or those after the cache could not be written
        found.add(chunk)
    found.check(max_broken, knob)
    found.log(knob)
    loaded = None if cache is None else cache.load()
    return loaded or (found.contents(), None)


def _check_broken(
    images: LazyImages, unreadable: Sequence[int], reasons: Sequence[str], max_broken: float, knob: str
) -> Broken:
    n, broken = len(images), [(images.name(i), reason) for i, reason in zip(unreadable, reasons, strict=True)]
    if len(broken) > max_broken * n or len(broken) == n:
        for name, reason in broken:
            log.warning("broken: %s (%s)", name, reason)
        first = "; ".join(f"{name} ({reason})" for name, reason in broken[:3])
        message = f"{len(broken)} of {n} files cannot be read (first: {first})"
        raise UserError(f"{knob}: {message}; repair or remove them, or raise data.max_broken={max_broken:g}")
    return broken
