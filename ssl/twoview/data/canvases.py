"""Square canvases with images of different sizes: statistics, and storage whose canvases grow with the images."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

PART_BYTES = 2**26  # size in bytes of the parts in which stored canvases are moved
VALUES = 2**18  # values from which statistics are computed at once; the cache of a processor holds them


def on_canvases(images: Sequence[Tensor], channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Place images in the top left corners of square canvases.

    Args:
        images: N images uint8 ``[C, h, w]`` with h and w up to ``size``.
        channels: number of channels C.
        size: height and width S of the canvases in pixels.

    Returns:
        uint8 ``[N, C, S, S]``, zero beside the images; and int64 ``[N, 2]``, height and width of each image.
    """
    pixels = torch.zeros(len(images), channels, size, size, dtype=torch.uint8)
    for canvas, image in zip(pixels, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return pixels, torch.tensor([image.shape[1:] for image in images], dtype=torch.int64).view(-1, 2)


def image_statistics(pixels: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Compute per-channel statistics of each image on the scale [0, 1].

    Args:
        pixels: uint8 ``[N, C, H, W]``.
        sizes: int64 ``[N, 2]``, height and width of each image, which lies in the top left corner of its canvas; None
            if the images fill their canvases.

    Returns:
        float64 ``[N, 3, C]``: the mean, the mean square, and the mean after multiplication of each pixel by a fixed
        random weight. This last mean differs between an image and its flipped or rotated copy.
    """
    if sizes is not None:
        found = torch.zeros(len(pixels), 3, pixels.shape[1], dtype=torch.float64)
        different, which, counts = sizes.unique(dim=0, return_inverse=True, return_counts=True)
        for (h, w), rows in zip(different.tolist(), which.argsort().split(counts.tolist()), strict=True):
            for part in rows.split(max(1, VALUES // (pixels.shape[1] * h * w))):
                found[part] = image_statistics(pixels[part, :, :h, :w])
        return found
    weights = _weights(pixels.shape[2:].numel())
    known = []
    for part in pixels.split(max(1, VALUES // max(1, pixels[:1].numel()))):
        values = part.cpu().flatten(2).float().div_(255)
        measured = (values, values.square(), values * weights)
        # All together: torch would divide the sum of a single channel among threads, which changes its last bits.
        known.append(torch.stack(measured, 1).mean(3, dtype=torch.float64))
    return torch.cat(known)


@lru_cache(maxsize=32)
def _weights(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


class Storage(NamedTuple):
    """Bytes in memory or in a file.

    Attributes:
        read: function ``(start, stop)`` that returns a copy of the bytes, uint8 ``[stop - start]``.
        write: function ``(start, values)`` that stores uint8 values of any shape from ``start`` on.
    """

    read: Callable[[int, int], Tensor]
    write: Callable[[int, Tensor], None]

    @classmethod
    def in_memory(cls, flat: Tensor) -> "Storage":
        """Storage in a tensor uint8 ``[bytes]``."""

        def write(start: int, values: Tensor) -> None:
            flat[start : start + values.numel()] = values.flatten()

        return cls(lambda start, stop: flat[start:stop].clone(), write)


class GrowingCanvases:
    """Writes images to canvases of equal size, without knowing the size of the largest image before.

    The canvases lie one after another from the start of the storage. When a larger image arrives, the canvases grow by
    at least a quarter, in place; at the end they shrink to the largest image. So the storage holds at most what is
    kept, and each byte is moved a few times at most.

    Args:
        storage: at least ``images * channels * limit ** 2`` bytes.
        channels: number of channels C.
        limit: largest possible height and width of an image in pixels.

    Attributes:
        count: number of images written.
        side: height and width S of the canvases in pixels.
    """

    def __init__(self, storage: Storage, channels: int, limit: int) -> None:
        self.storage, self.channels, self.limit = storage, channels, limit
        self.count = self.side = self.largest = 0

    def add(self, pixels: Tensor) -> None:
        """Append canvases uint8 ``[n, C, s, s]``, where s is the height or width of the largest image among them."""
        size = pixels.shape[-1]
        self.largest = max(self.largest, size)
        if size > self.side:
            self._move(min(self.limit, max(size, self.side * 5 // 4)))
        self.storage.write(self.count * self._bytes(self.side), _on_canvas(pixels, self.side))
        self.count += len(pixels)

    def finish(self) -> int:
        """Reduce the canvases to the largest image; return their size S."""
        self._move(self.largest)
        return self.side

    def _bytes(self, side: int) -> int:
        return self.channels * side * side

    def _move(self, side: int) -> None:
        old, part = self.side, max(1, PART_BYTES // self._bytes(max(side, self.side, 1)))
        self.side = side
        starts = range(0, self.count if side != old else 0, part)
        # Growing moves the last canvases first, so that no canvas is overwritten before it is read.
        for start in reversed(starts) if side > old else starts:
            stop = min(start + part, self.count)
            canvases = self.storage.read(start * self._bytes(old), stop * self._bytes(old))
            self.storage.write(start * self._bytes(side), _on_canvas(canvases.view(-1, self.channels, old, old), side))


def _on_canvas(pixels: Tensor, side: int) -> Tensor:
    """Crop canvases uint8 ``[n, C, s, s]``, or enlarge them with zeros, to ``[n, C, side, side]``."""
    kept = min(side, pixels.shape[-1])
    if kept == side:
        return pixels[..., :side, :side]
    canvases = pixels.new_zeros(*pixels.shape[:2], side, side)
    canvases[..., :kept, :kept] = pixels
    return canvases
