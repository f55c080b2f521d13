"""The images of a run in memory, and the order in which training sees them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from twoview.data.decode import square
from twoview.errors import UserError

WINDOW = 32  # blocks that images are drawn from at a time


class Batch(NamedTuple):
    """What training gets: ``pixels`` uint8 [N, C, H, W], ``ids`` int64 [N], ``labels`` int64 [N], -1 where unknown."""

    pixels: Tensor
    ids: Tensor
    labels: Tensor


@dataclass
class ImageArrays(Dataset[Batch]):
    """Images of one split as one tensor; indexed with many positions at a time.

    Args:
        pixels: uint8 ``[N, C, S, S]``.
        labels: int64 ``[N]``, -1 where unknown.
        blocks: int64 ``[N]``, the block that each image lay in, if it lay in one; keeps the order of training what it
            would be out of memory.
        names: what each image is called, such as the path of its file.
    """

    pixels: Tensor
    labels: Tensor
    blocks: Tensor | None = None
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4 or self.pixels.shape[2] != self.pixels.shape[3]:
            raise UserError(f"images must be uint8 [N, C, S, S], not {self.pixels.dtype} {list(self.pixels.shape)}")
        if len(self.labels) != len(self.pixels):
            raise UserError(f"{len(self.pixels)} images with {len(self.labels)} labels: give one label an image")

    num_workers = 0  # nothing is left to do for a loader process

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, positions: Sequence[int] | Tensor) -> Batch:
        ids = torch.as_tensor(positions, dtype=torch.int64)
        return Batch(self.pixels[ids.to(self.pixels.device)], ids, self.labels[ids])

    @property
    def size(self) -> int:
        """S, height and width of the stored images in pixels."""
        return self.pixels.shape[2]

    @property
    def channels(self) -> int:
        """C of the images."""
        return self.pixels.shape[1]

    def subset(self, positions: Tensor) -> "ImageArrays":
        """The images at some positions."""
        blocks = None if self.blocks is None else self.blocks[positions]
        names = None if self.names is None else [self.names[i] for i in positions.tolist()]
        return ImageArrays(self.pixels[positions], self.labels[positions], blocks, names)

    def name(self, position: int) -> str:
        """What the image at a position is called; its number if it has no name."""
        return f"image {position}" if self.names is None else self.names[position]

    def with_labels(self, labels: Tensor) -> "ImageArrays":
        """The same images with other labels."""
        return replace(self, labels=labels)

    def moments(self) -> Tensor:
        """float64 ``[N, 3, C]``, the statistics of each image; see :func:`moments`."""
        return moments(self.pixels)


class Images(Protocol):
    """Images of one split, in memory (:class:`ImageArrays`) or decoded when asked for (``folder.Pictures``)."""

    labels: Tensor
    num_workers: int

    @property
    def blocks(self) -> Tensor | None:
        """int64 ``[N]``, the block that each image lies in; None where any order is as good as any other."""

    @property
    def size(self) -> int:
        """Height and width of the stored images in pixels."""

    @property
    def channels(self) -> int:
        """C of the images."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Any) -> Batch: ...

    def subset(self, positions: Tensor) -> "Images":
        """The images at some positions."""

    def name(self, position: int) -> str:
        """What the image at a position is called."""

    def with_labels(self, labels: Tensor) -> "Images":
        """The same images with other labels."""

    def moments(self) -> Tensor:
        """float64 ``[N, 3, C]``, the statistics of each image; see :func:`moments`."""


def moments(pixels: Tensor) -> Tensor:
    """Statistics of uint8 ``[N, C, H, W]`` on the scale [0, 1], float64 ``[N, 3, C]``.

    Of each channel the mean, the mean square, and the mean with fixed random weights, which tells an image from a
    mirrored or turned one.
    """
    known, places = [], pixels.shape[2] * pixels.shape[3]
    weights = torch.rand(places, generator=torch.Generator().manual_seed(0))
    for part in pixels.split(max(1, 2**22 // max(1, pixels[:1].numel()))):
        values = part.cpu().flatten(2).float().div_(255)
        known.append(
            torch.stack([x.mean(2, dtype=torch.float64) for x in (values, values.square(), values * weights)], 1)
        )
    return torch.cat(known) if known else torch.zeros(0, 3, pixels.shape[1], dtype=torch.float64)


def split_labels(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of two parts, fixed by ``seed``, with each class in proportion where the parts are large enough.

    Args:
        labels: int64 ``[N]``.
        share: of the second part, in (0, 1).
        seed: of the split.

    Returns:
        int64 positions ``[N - n]`` and ``[n]``, ascending.

    Raises:
        ValueError: a part would be empty.
    """
    counts = labels.unique(return_counts=True)[1]
    proportional = int(counts.min()) > 1 and int(share * len(labels)) >= len(counts)
    parts = train_test_split(
        np.arange(len(labels)), test_size=share, stratify=labels.numpy() if proportional else None, random_state=seed
    )
    first, second = (torch.from_numpy(np.sort(part)) for part in parts)
    return first, second


def in_order(images: Images, batch_size: int = 512) -> DataLoader[Batch]:
    """All images once, in their order, for evaluation and statistics."""
    chunks: Any = list(torch.arange(len(images)).split(batch_size))
    return DataLoader(images, batch_size=None, sampler=chunks, num_workers=images.num_workers)  # type: ignore[arg-type]


class BatchOrder(Sampler[Tensor]):
    """Positions of each batch as a function of (seed, epoch, position), so that a resumed run goes on exactly.

    Every rank gets the same number of equal batches; an incomplete last global batch is left out of the epoch. Images
    that lie in blocks are shuffled block by block, then within every 32 blocks, and each rank reads its own.

    Args:
        size: number of images.
        batch_size: global batch: over all ranks, before accumulation.
        seed: of the permutations.
        batches_done: tells how many batches the run has had, read when an epoch starts.
        rank: of this process.
        world_size: number of processes.
        blocks: int64 ``[size]``, the block that each image lies in, or None.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        batches_done: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
        blocks: Tensor | None = None,
    ) -> None:
        self.size, self.batch_size, self.seed, self.batches_done = size, batch_size, seed, batches_done
        self.rank, self.world_size, self.blocks = rank, world_size, blocks

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        epoch, first = divmod(self.batches_done(), len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=generator)
        if self.blocks is None:
            for i in range(first, len(self)):
                yield order[i * self.batch_size : (i + 1) * self.batch_size][self.rank :: self.world_size]
            return
        # A stable sort keeps the random order within a window of blocks.
        shuffled = torch.randperm(int(self.blocks.max()) + 1, generator=generator)
        order = order[(shuffled[self.blocks[order]] // WINDOW).argsort(stable=True)]
        share = self.batch_size // self.world_size
        own = order[self.rank * len(self) * share : (self.rank + 1) * len(self) * share]
        yield from own.split(share)[first:]


class ImageData(L.LightningDataModule):
    """All images of a run.

    Args:
        pretrain: images to learn from; their labels are used by supervised methods alone.
        train: labelled images for the evaluation, often the same object as ``pretrain``; None for no evaluation.
        test: labelled images, read once at the very end; None for no evaluation.
        classes: names of the classes.
        batch_size: global batch of pretraining, over all ranks, before accumulation; images at a time in evaluation.
        name: of the data set, for reports.
        mirror: whether a mirrored image is still the same thing.
        least_crop: share of an image's area below which a crop may be of anything.
        image_size: height and width that the network sees; None for those of the images.

    Raises:
        UserError: labels out of range.
    """

    def __init__(
        self,
        pretrain: Images,
        train: Images | None,
        test: Images | None,
        classes: Sequence[str],
        batch_size: int = 256,
        name: str = "images",
        mirror: bool = True,
        least_crop: float = 0.0,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        for split, images in (("training", train), ("test", test)):
            if images is not None and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < len(classes):
                raise UserError(
                    f"{name}: {split} labels must lie in 0 to {len(classes) - 1} for {len(classes)} classes"
                )
        self.pretrain, self.train, self.test = pretrain, train, test
        self.classes, self.batch_size, self.name = list(classes), batch_size, name
        self.mirror, self.least_crop = mirror, least_crop
        self.image_size = image_size or pretrain.size
        self.broken: list[tuple[str, str]] = []  # files that were left out, and why
        self.seed = 0

    @property
    def view_limits(self) -> dict[str, Any]:
        """What the augmentation must know of these images, as arguments of :class:`twoview.augment.TwoViews`."""
        mean, std = self.mean_std
        size = {"image_size": self.image_size, "channels": self.channels}
        return {**size, "mean": mean, "std": std, "mirror": self.mirror, "least_crop": self.least_crop}

    @property
    def channels(self) -> int:
        """C of the images."""
        return self.pretrain.channels

    @cached_property
    def _moments(self) -> Tensor:
        return self.pretrain.moments()

    @cached_property
    def mean_std(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel over the images to learn from, on the scale [0, 1]."""
        mean, square = self._moments[:, :2].mean(0)
        return mean.tolist(), (square - mean**2).clamp(min=1e-6).sqrt().tolist()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all images, by the statistics of each, and of their labels and order."""
        content = self._moments.numpy().tobytes() + self.pretrain.labels.numpy().tobytes()
        for split in (self.train, self.test):
            if split is not None:
                content += split.moments().numpy().tobytes() + split.labels.numpy().tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def hide_labels(self, positions: Tensor) -> None:
        """Keep the labels of some images of ``train`` from pretraining, so that choices can be made on them.

        Args:
            positions: int64, in ``train``.
        """
        known = torch.nonzero(self.pretrain.labels >= 0).flatten()
        if self.train is not None and len(known) == len(self.train):  # the same ones, in the same order
            labels = self.pretrain.labels.clone()
            labels[known[positions]] = -1
            self.pretrain = self.pretrain.with_labels(labels)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of unaugmented uint8 images, which lie on a GPU already if they take a quarter of what is free."""
        if self.trainer is None:
            raise RuntimeError("train_dataloader is for the Trainer")
        device, world_size = self.trainer.strategy.root_device, self.trainer.world_size
        images = self.pretrain
        held = False
        if isinstance(images, ImageArrays) and device.type == "cuda":
            held = images.pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4
            images.pixels = images.pixels.to(device) if held else images.pixels
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        order = BatchOrder(
            len(self.pretrain),
            self.batch_size,
            self.seed,
            lambda: progress.total.ready,
            self.trainer.global_rank,
            world_size,
            images.blocks,
        )
        pin = device.type == "cuda" and not held
        return DataLoader(
            images,  # type: ignore[arg-type]
            batch_size=None,
            sampler=order,
            pin_memory=pin,
            num_workers=images.num_workers,
            persistent_workers=images.num_workers > 0,
        )


def fit_size(pixels: Tensor, size: int) -> Tensor:
    """uint8 ``[N, C, H, W]`` resized to ``[N, C, size, size]``, bilinear with antialias; as it is where it fits."""
    if pixels.shape[2:] == (size, size):
        return pixels
    parts = [F.interpolate(p.float(), (size, size), mode="bilinear", antialias=True) for p in pixels.split(1024)]
    return torch.cat([p.round().clamp(0, 255).to(torch.uint8) for p in parts])


def fit_channels(pixels: Tensor, channels: int) -> Tensor:
    """uint8 ``[N, C, H, W]`` with 1 channel repeated to 3, or 3 turned into the luma of ITU-R 601.

    Raises:
        UserError: any other change.
    """
    have = pixels.shape[1]
    if have == channels:
        return pixels
    if (have, channels) == (1, 3):
        return pixels.expand(-1, 3, -1, -1).contiguous()
    if (have, channels) == (3, 1):
        luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        return torch.cat([(p * luma).sum(1, keepdim=True).round().to(torch.uint8) for p in pixels.split(1024)])
    raise UserError(f"data.channels={channels}: these images have {have}; only 1 and 3 turn into each other")


class Preprocess(nn.Module):
    """What evaluation and deployment do with an image: resize, cut out the centre square, scale, normalise.

    Args:
        image_size: height and width of the result in pixels.
        mean: C means on the scale [0, 1].
        std: C deviations on the same scale.
        store_size: what the short side is resized to first; None for ``image_size``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, image_size: int, mean: Sequence[float], std: Sequence[float], store_size: int | None = None
    ) -> None:
        super().__init__()
        self.image_size, self.store_size = image_size, store_size or image_size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor | Image.Image) -> Tensor:
        """Normalise.

        Args:
            images: uint8 ``[N, C, H, W]`` or ``[C, H, W]``, or one PIL image.

        Returns:
            fp32 ``[N, C, image_size, image_size]``, on the device of this module.

        Raises:
            TypeError: a tensor that is not uint8.
        """
        channels = len(self.mean)
        if isinstance(images, Image.Image):
            images = square(images, self.store_size, channels)
        if images.dtype != torch.uint8:
            raise TypeError(f"Preprocess takes uint8 images in [0, 255], not {images.dtype}")
        images = fit_channels(images[None] if images.ndim == 3 else images, channels)
        if tuple(images.shape[2:]) != (self.store_size, self.store_size):
            images = torch.stack([square(image, self.store_size, channels) for image in images.cpu()])
        top = (self.store_size - self.image_size) // 2
        pixels = images[:, :, top : top + self.image_size, top : top + self.image_size].to(self.mean.device)
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)
