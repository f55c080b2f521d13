"""The images of a run in memory, and the order in which training sees them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from twoview.errors import UserError


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
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4 or self.pixels.shape[2] != self.pixels.shape[3]:
            raise UserError(f"images must be uint8 [N, C, S, S], not {self.pixels.dtype} {list(self.pixels.shape)}")
        if len(self.labels) != len(self.pixels):
            raise UserError(f"{len(self.pixels)} images with {len(self.labels)} labels: give one label an image")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, positions: Sequence[int] | Tensor) -> Batch:
        ids = torch.as_tensor(positions, dtype=torch.int64)
        return Batch(self.pixels[ids.to(self.pixels.device)], ids, self.labels[ids])


class BatchOrder(Sampler[Tensor]):
    """Positions of each batch as a function of (seed, epoch, position), so that a resumed run goes on exactly.

    Every rank gets the same number of equal batches; an incomplete last global batch is left out of the epoch.

    Args:
        size: number of images.
        batch_size: global batch: over all ranks, before accumulation.
        seed: of the permutations.
        batches_done: tells how many batches the run has had, read when an epoch starts.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        batches_done: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size, self.batch_size, self.seed, self.batches_done = size, batch_size, seed, batches_done
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        epoch, first = divmod(self.batches_done(), len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=generator)
        for i in range(first, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size][self.rank :: self.world_size]


class ImageData(L.LightningDataModule):
    """All images of a run.

    Args:
        pretrain: images to learn from; their labels are used by supervised methods alone.
        train: labelled images for the evaluation; often the same object as ``pretrain``.
        test: labelled images, read once at the very end.
        classes: names of the classes.
        batch_size: global batch of pretraining: over all ranks, before accumulation.
        name: of the data set, for reports.
        mirror: whether a mirrored image is still the same thing.
        least_crop: share of an image's area below which a crop may be of anything.

    Raises:
        UserError: a batch that is too small for negatives or larger than the data set; labels out of range.
    """

    def __init__(
        self,
        pretrain: ImageArrays,
        train: ImageArrays,
        test: ImageArrays,
        classes: Sequence[str],
        batch_size: int = 256,
        name: str = "images",
        mirror: bool = True,
        least_crop: float = 0.0,
    ) -> None:
        super().__init__()
        if not 2 <= batch_size <= len(pretrain):
            raise UserError(
                f"data.batch_size={batch_size}: {name} has {len(pretrain)} images to learn from; "
                f"choose 2 to {len(pretrain)}"
            )
        for split, images in (("training", train), ("test", test)):
            if int(images.labels.min()) < 0 or int(images.labels.max()) >= len(classes):
                raise UserError(
                    f"{name}: {split} labels must lie in 0 to {len(classes) - 1} for {len(classes)} classes"
                )
        self.pretrain, self.train, self.test = pretrain, train, test
        self.classes, self.batch_size, self.name = list(classes), batch_size, name
        self.mirror, self.least_crop = mirror, least_crop
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
        return self.pretrain.pixels.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.pretrain.pixels.shape[2]

    @cached_property
    def mean_std(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel over the images to learn from, on the scale [0, 1]."""
        sums = torch.zeros(2, self.channels, dtype=torch.float64)
        for part in self.pretrain.pixels.split(4096):
            values = part.to("cpu", torch.float32).div_(255).transpose(0, 1).flatten(1)
            sums += torch.stack([values.sum(1, dtype=torch.float64), values.square_().sum(1, dtype=torch.float64)])
        mean, square = sums / (self.pretrain.pixels.numel() / self.channels)
        return mean.tolist(), (square - mean**2).clamp(min=1e-6).sqrt().tolist()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of unaugmented uint8 images, which lie on a GPU already if they take a quarter of what is free."""
        if self.trainer is None:
            raise RuntimeError("train_dataloader is for the Trainer")
        device, world_size = self.trainer.strategy.root_device, self.trainer.world_size
        if self.batch_size % world_size:
            raise UserError(f"data.batch_size={self.batch_size} cannot be divided among trainer.devices={world_size}")
        if device.type == "cuda" and self.pretrain.pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.pretrain.pixels = self.pretrain.pixels.to(device, non_blocking=True)
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        order = BatchOrder(
            len(self.pretrain),
            self.batch_size,
            self.seed,
            lambda: progress.total.ready,
            self.trainer.global_rank,
            world_size,
        )
        pin = device.type == "cuda" and not self.pretrain.pixels.is_cuda
        return DataLoader(self.pretrain, batch_size=None, sampler=order, pin_memory=pin)


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
    """What evaluation and deployment do with an image: resize to the square size of the run, scale, normalise.

    Args:
        image_size: height and width in pixels.
        mean: C means on the scale [0, 1].
        std: C deviations on the same scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor | Image.Image) -> Tensor:
        """Normalise.

        Args:
            images: uint8 ``[N, C, H, W]`` or ``[C, H, W]``, or one PIL image.

        Returns:
            fp32 ``[N, C, image_size, image_size]``, on the device of this module.
        """
        if isinstance(images, Image.Image):
            images = torch.from_numpy(np.array(images.convert("L" if len(self.mean) == 1 else "RGB")))
            images = images[None] if images.ndim == 2 else images.permute(2, 0, 1)
        if images.dtype != torch.uint8:
            raise TypeError(f"Preprocess takes uint8 images in [0, 255], not {images.dtype}")
        images = images[None] if images.ndim == 3 else images
        pixels = fit_size(fit_channels(images, len(self.mean)), self.image_size).to(self.mean.device)
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)
