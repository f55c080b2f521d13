"""Read all images of a split once before training: find damaged files, and keep the pixels if they fit in memory."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from twoview.data.decode import Shape, square_and_shape
from twoview.data.images import Images, LazyImages, TensorImages, image_statistics
from twoview.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 256  # largest number of images that a worker returns at a time
CHUNK_BYTES = 2**23  # largest size in bytes of the pixels that a worker returns at a time


class _Chunk(NamedTuple):
    """Result of reading a chunk of images; ``values`` are the pixels or the statistics of the readable images.

    The values are an array, because each tensor would keep a shared memory file open.
    """

    values: np.ndarray
    readable: list[int]
    unreadable: list[int]
    broken: list[tuple[str, str]]
    kinds: Counter[str]
    shapes: set[Shape]


def _identity(chunk: Any) -> Any:
    return chunk


class _Scan(Dataset[_Chunk]):
    def __init__(self, images: LazyImages, keep: bool) -> None:
        self.images, self.keep = images, keep

    def __getitem__(self, positions: Any) -> _Chunk:
        images, pixels = self.images, []
        chunk = _Chunk(np.zeros(0), [], [], [], Counter(), set())
        for position in torch.as_tensor(positions).tolist():
            try:
                item = images.source[position]
                one, shape = square_and_shape(item, images.size, images.channels)
            except MemoryError:
                raise
            except Exception as error:
                chunk.unreadable.append(position)
                chunk.broken.append((images.name(position), f"{type(error).__name__}: {error}"))
            else:
                pixels.append(one)
                chunk.readable.append(position)
                chunk.shapes.add(shape)
                chunk.kinds["packed" if isinstance(item, bytes) else Path(item).suffix.lower()] += 1
        none = torch.zeros(0, images.channels, images.size, images.size, dtype=torch.uint8)
        stacked = torch.stack(pixels) if pixels else none
        return chunk._replace(values=(stacked if self.keep else image_statistics(stacked)).numpy())


def read_all(images: LazyImages, max_broken: float, knob: str, keep: bool) -> tuple[Images, list[tuple[str, str]]]:
    """Decode every image once.

    Args:
        images: all images of a source, in the order of the source.
        max_broken: largest share of the images that may be unreadable, in [0, 1].
        knob: name of the knob that sets the source, for messages.
        keep: whether to keep the pixels in memory; otherwise only the statistics are kept.

    Returns:
        The readable images; and for each unreadable image, its name and the reason.

    Raises:
        UserError: if too many images are unreadable.
    """
    n = len(images)
    positions = torch.arange(n).split(max(1, min(CHUNK, CHUNK_BYTES // (images.channels * images.size**2))))
    workers = images.num_workers if len(positions) > 4 else 0  # few images are read faster than processes start
    scan: Any = _Scan(images, keep)
    chunks = list(DataLoader(scan, None, sampler=list(positions), num_workers=workers, collate_fn=_identity))
    broken = [entry for chunk in chunks for entry in chunk.broken]
    if len(broken) > max_broken * n or len(broken) == n:
        for name, reason in broken:
            log.warning("broken: %s (%s)", name, reason)
        first = "; ".join(f"{name} ({reason})" for name, reason in broken[:3])
        message = f"{len(broken)} of {n} files cannot be read (first: {first})"
        raise UserError(f"{knob}: {message}; repair or remove them, or raise data.max_broken={max_broken:g}")
    images.lost[[position for chunk in chunks for position in chunk.unreadable]] = True
    _log_contents(chunks, images, len(broken), knob)
    readable = images.subset(torch.tensor([position for chunk in chunks for position in chunk.readable]))
    values = torch.from_numpy(np.concatenate([chunk.values for chunk in chunks]))
    if keep:
        names = [readable.name(i) for i in range(len(readable))]
        return TensorImages(values, readable.labels, readable.blocks, names), broken
    readable.known_statistics = values
    return readable, broken


def _log_contents(chunks: list[_Chunk], images: LazyImages, broken: int, knob: str) -> None:
    kinds = sum((chunk.kinds for chunk in chunks), Counter[str]())
    shapes = set[Shape]().union(*(chunk.shapes for chunk in chunks))
    heights, widths, channels = (sorted(set(values)) for values in zip(*shapes, strict=True))
    high, wide = (str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in (heights, widths))
    sizes = f"{high} pixels high and {wide} wide, {' or '.join(map(str, channels))} channels"
    found = f"{len(images) - broken:,} images ({', '.join(f'{c:,} {kind}' for kind, c in kinds.most_common())})"
    classes = len(images.labels[images.labels >= 0].unique())
    labels = f"{classes} classes" if classes else "no labels"
    log.info("data: %s has %s, %s, %s; %d broken files", knob, found, sizes, labels, broken)
