"""Images of one split, in memory or decoded on access; image statistics and held-out splits."""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from twoview.data.canvases import image_statistics, on_canvases
from twoview.data.decode import whole
from twoview.data.preprocess import center_squares
from twoview.errors import UserError, require

log = logging.getLogger(__name__)

WINDOW = 32  # number of blocks whose images are shuffled together


class Batch(NamedTuple):
    """A batch of images, each in the top left corner of a square canvas whose rest is zero.

    Attributes:
        pixels: uint8 ``[N, C, S, S]``.
        ids: int64 ``[N]``, positions of the images in their split.
        labels: int64 ``[N]``, -1 where unknown.
        sizes: int64 ``[N, 2]``, height and width of each image, in 1 to S; None if every image of the split fills its
            canvas.
    """

    pixels: Tensor
    ids: Tensor
    labels: Tensor
    sizes: Tensor | None = None

    def squares(self, size: int) -> Tensor:
        """Return the center squares resized to ``size``, see :func:`twoview.data.center_squares`."""
        return center_squares(self.pixels, self.sizes, size)


@dataclass
class TensorImages(Dataset[Batch]):
    """Images of one split in one tensor; indexing by a sequence of positions returns a :class:`Batch`.

    Args:
        pixels: uint8 ``[N, C, S, S]``; or ``[M, C, S, S]`` with ``rows``.
        labels: int64 ``[N]``, -1 where unknown.
        blocks: int64 ``[N]``, index of the storage block that held each image, such as a Parquet row group; None if
            there are no blocks. Training shuffles by block, so that the order is the same for images in memory and for
            images decoded on access.
        names: name of each canvas in ``pixels``, such as the path of its file; None if the images have no names.
        known_statistics: result of :meth:`statistics` if it is already known, else None.
        sizes: int64 ``[N, 2]``, height and width of each image, which lies in the top left corner of its canvas; None
            if every image fills its canvas.
        rows: int64 ``[N]``, position of each image in ``pixels``; None if these are its images in their order. With
            ``rows``, a subset has the same ``pixels``, so that images in a file are not read into memory.
        loaders: number of loader processes, for images in a file.

    Attributes:
        channels: number of channels C.
        size: height and width S of the canvases in pixels.

    Raises:
        UserError: if ``pixels`` or ``sizes`` has another dtype or shape, or the number of labels is not N.
    """

    pixels: Tensor
    labels: Tensor
    blocks: Tensor | None = None
    names: Sequence[str] | None = None
    known_statistics: Tensor | None = None
    sizes: Tensor | None = None
    rows: Tensor | None = None
    loaders: int = 0

    def __post_init__(self) -> None:
        dtype, shape, labels = self.pixels.dtype, list(self.pixels.shape), len(self.labels)
        images = shape[:1] if self.rows is None else [len(self.rows)]
        fits = dtype == torch.uint8 and len(shape) == 4 and shape[2] == shape[3]
        require(fits, f"images must be uint8 [N, C, S, S], not {dtype} {shape}")
        require([labels] == images, f"{images[0]} images with {labels} labels: give one label per image")
        self.channels, self.size = self.pixels.shape[1:3]
        known = self.sizes is None or (self.sizes.dtype == torch.int64 and list(self.sizes.shape) == [*images, 2])
        require(known, f"sizes must be int64 [{images[0]}, 2]: height and width of each image")
        inside = self.sizes is None or not labels or 1 <= int(self.sizes.min()) <= int(self.sizes.max()) <= self.size
        require(inside, f"sizes must lie in 1 to {self.size}, the size of the canvases")

    @property
    def num_workers(self) -> int:
        """Number of loader processes; 0 for images on a GPU, which other processes cannot read."""
        return 0 if self.pixels.is_cuda else self.loaders

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, positions: Sequence[int] | Tensor) -> Batch:
        ids = torch.as_tensor(positions, dtype=torch.int64)
        where = (ids if self.rows is None else self.rows[ids]).to(self.pixels.device)
        return Batch(self.pixels[where], ids, self.labels[ids], None if self.sizes is None else self.sizes[ids])

    def subset(self, positions: Tensor) -> "TensorImages":
        """Return the images at the given positions, int64 ``[M]``."""
        own = {name: getattr(self, name) for name in ("blocks", "known_statistics", "sizes", "rows")}
        kept: Any = {name: value if value is None else value[positions] for name, value in own.items()}
        if self.rows is None:
            kept["pixels"] = self.pixels[positions]
            kept["names"] = None if self.names is None else [self.names[i] for i in positions.tolist()]
        return replace(self, labels=self.labels[positions], **kept)

    def name(self, position: int) -> str:
        """Return the name of the image at a position, or "image POSITION" if the images have no names."""
        where = position if self.rows is None else int(self.rows[position])
        return f"image {where}" if self.names is None else self.names[where]

    def with_labels(self, labels: Tensor) -> "TensorImages":
        """Return the same images with other labels, int64 ``[N]``."""
        return replace(self, labels=labels)

    def statistics(self) -> Tensor:
        """Statistics of each image, float64 ``[N, 3, C]``; see :func:`image_statistics`."""
        if self.known_statistics is None:
            known = self.rows is None
            parts = [(self.pixels, self.sizes)] if known else ((b.pixels, b.sizes) for b in in_order(self))
            self.known_statistics = torch.cat([image_statistics(*part) for part in parts])
        return self.known_statistics


class LazyImages(Dataset[Batch]):
    """Images of one split that are decoded on access, with the interface of :class:`TensorImages`.

    Args:
        source: sequence of images in any form that :func:`twoview.data.whole` takes. It may have an attribute
            ``starts``, the position of the first image of each storage block, and a method ``name(position)``, which
            returns the name of an image for messages.
        labels: int64 ``[N]``, -1 where unknown.
        size: largest height and width of the decoded images in pixels, and the size S of their canvases; larger images
            are reduced.
        channels: number of channels C.
        num_workers: number of loader processes.
        max_broken: largest share of the images that may be or become unreadable, in [0, 1].
    """

    def __init__(
        self,
        source: Sequence[Any],
        labels: Tensor,
        size: int,
        channels: int,
        num_workers: int = 0,
        max_broken: float = 0.01,
    ) -> None:
        self.source, self.labels, self.size, self.channels = source, labels, size, channels
        self.max_broken = max_broken
        # bool [N], positions in the source that cannot be read; shared with loader processes.
        self.lost = torch.zeros(len(source), dtype=torch.bool).share_memory_()
        self.num_workers, self.positions = num_workers, torch.arange(len(source))  # int64 [N], in source
        self.full = False  # whether every image is known to fill its canvas
        self.known_statistics: Tensor | None = None  # float64 [N, 3, C], once all images have been read

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, positions: Any) -> Batch:
        images, ids = zip(*(self._decode(i) for i in torch.as_tensor(positions).tolist()), strict=True)
        pixels, sizes = on_canvases(images, self.channels, self.size)
        return Batch(pixels, torch.tensor(ids), self.labels[list(ids)], None if self.full else sizes)

    @property
    def blocks(self) -> Tensor | None:
        """Index of the storage block that holds each image, int64 ``[N]``; None if the source has no blocks."""
        starts = getattr(self.source, "starts", None)
        return None if starts is None else torch.bucketize(self.positions, torch.as_tensor(starts), right=True)

    def subset(self, positions: Tensor) -> "LazyImages":
        """Return the images at the given positions, int64 ``[M]``."""
        part = self.with_labels(self.labels[positions])
        part.positions = self.positions[positions]
        part.known_statistics = None if self.known_statistics is None else self.known_statistics[positions]
        return part

    def name(self, position: int) -> str:
        """Return the name of the image at a position, or "item POSITION" if the source has no names."""
        where = int(self.positions[position])
        return str(self.source.name(where)) if hasattr(self.source, "name") else f"item {where}"

    def with_labels(self, labels: Tensor) -> "LazyImages":
        """Return the same images with other labels, int64 ``[N]``."""
        same = copy.copy(self)
        same.labels = labels
        return same

    def statistics(self) -> Tensor:
        """Statistics of each image, float64 ``[N, 3, C]``; see :func:`image_statistics`."""
        if self.known_statistics is None:
            parts = [image_statistics(batch.pixels, batch.sizes) for batch in in_order(self)]
            self.known_statistics = torch.cat(parts)
        return self.known_statistics

    def _decode(self, position: int) -> tuple[Tensor, int]:
        """Decode an image, or another one if it has become unreadable since the start; return the position too."""
        for candidate in self._candidates(position):
            where = int(self.positions[candidate])
            if self.lost[where]:
                continue
            try:
                image = whole(self.source[where], self.size, self.channels)
                if self.full and image.shape[1:] != (self.size, self.size):
                    raise ValueError("its size has changed")
                return image, candidate
            except MemoryError:
                raise
            except Exception as error:
                self._lose(where, self.name(candidate), error)
        raise UserError("data: no image can be read any more; check that the disk is still mounted")

    def _candidates(self, position: int) -> Iterator[int]:
        """A position, then the positions after it, those with the same label first."""
        yield position
        others = torch.arange(len(self)).roll(-position - 1)[:-1]
        same = self.labels[others] == self.labels[position]
        yield from torch.cat([others[same], others[~same]]).tolist()

    def _lose(self, where: int, name: str, error: Exception) -> None:
        """Count an image that has become unreadable, and end the run if there are too many."""
        self.lost[where] = True
        lost, n = int(self.lost.sum()), len(self.lost)
        log.warning("data: %s can no longer be read (%s); another image replaces it", name, error)
        message = f"{lost} of {n} images can no longer be read, the last is {name} ({error}); check the disk"
        require(lost <= self.max_broken * n, f"data.max_broken={self.max_broken:g}: {message}")


# Images of one split, in memory or decoded on access.
Images = TensorImages | LazyImages


def split_labels(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split the positions of images into two random parts.

    The split is stratified by class if each class has at least two images and the second part has at least as many
    images as there are classes.

    Args:
        labels: int64 ``[N]``.
        share: share of the images that the second part gets, in (0, 1).
        seed: seed of the split.

    Returns:
        Positions of the first part, int64 ``[N - n]``, and of the second part, int64 ``[n]``, both ascending.

    Raises:
        ValueError: if a part would be empty.
    """
    from sklearn.model_selection import train_test_split

    counts = labels.unique(return_counts=True)[1]
    classes = labels.numpy() if int(counts.min()) > 1 and int(share * len(labels)) >= len(counts) else None
    first, second = train_test_split(np.arange(len(labels)), test_size=share, stratify=classes, random_state=seed)
    return torch.from_numpy(np.sort(first)), torch.from_numpy(np.sort(second))


def split_holdout(labels: Tensor, share: float, seed: int, knob: str = "eval.holdout") -> tuple[Tensor, Tensor]:
    """Split the positions of images into a part to fit on and a held-out part, as :func:`split_labels` does.

    Args:
        labels: int64 ``[N]``.
        share: share of the images that is held out, in (0, 1).
        seed: seed of the split.
        knob: name of the knob that sets ``share``, for the error message.

    Returns:
        Positions of the part to fit on, int64 ``[N - n]``, and of the held-out part, int64 ``[n]``, both ascending.

    Raises:
        UserError: if a part would be empty.
    """
    try:
        return split_labels(labels, share, seed)
    except ValueError as error:
        raise UserError(f"{knob}={share}: cannot hold out that share of {len(labels)} labels ({error})") from error


def fixed_sample(size: int, limit: int) -> Tensor:
    """Draw positions of images in a fixed random order, since the first images may all be of one class.

    Args:
        size: number of images.
        limit: largest number of positions.

    Returns:
        int64 ``[min(size, limit)]``.
    """
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:limit]


def in_order(images: Images, batch_size: int = 512) -> DataLoader[Batch]:
    """Return a loader of all images in their order, for evaluation and statistics.

    Args:
        images: images of one split.
        batch_size: number of images per batch; the last batch may be smaller.
    """
    chunks: Any = list(torch.arange(len(images)).split(batch_size))
    return DataLoader(images, batch_size=None, sampler=chunks, num_workers=images.num_workers)
