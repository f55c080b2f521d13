"""One or two sets of images that are searched for duplicates, and small copies of all of them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.data import Batch, ImageData, TensorImages, fit_channels, in_order
from twoview.evaluation.pixel_pairs import pixel_hashes
from twoview.evaluation.progress import add_steps

SIDE = 64  # height and width in pixels at which images are compared
COLOR_SIDE = 16  # height and width in pixels at which colors are compared


class SmallCopies(NamedTuple):
    """What is known of each image, about 5 kB.

    Attributes:
        gray: uint8 ``[N, 64, 64]``, whole images in gray; height and width are scaled to 64, whatever the aspect ratio.
        color: uint8 ``[N, 3, 16, 16]``, whole images in color, scaled in the same way; gray images have equal channels.
        sizes: int64 ``[N, 2]``, height and width of each image as it is stored.
        hashes: hash of each image as it is stored, see :func:`twoview.evaluation.pixel_pairs.pixel_hashes`.
    """

    gray: Tensor
    color: Tensor
    sizes: Tensor
    hashes: list[bytes]


class ImageSets:
    """Images of one or two sets with common positions, from 0 to N - 1; those of the second set are the last.

    Args:
        first: the images of the first set.
        second: the images of the second set; None if there is one set only.

    Attributes:
        parts: all splits, each of which holds different images.
        labels: what is written before the names of images without a file, for each split.
        border: position of the first image of the second set; N without a second set.
    """

    def __init__(self, first: ImageData, second: ImageData | None = None) -> None:
        splits = first.splits
        self.border = sum(map(len, splits.values()))
        splits |= {f"against {name}": part for name, part in second.splits.items()} if second is not None else {}
        self.parts, self.labels = list(splits.values()), list(splits)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def locate(self, position: int) -> tuple[int, int]:
        """Return the number of the split that holds an image, and the position of the image in this split."""
        for number, part in enumerate(self.parts):
            if position < len(part):
                return number, position
            position -= len(part)
        raise IndexError(position)

    def name(self, position: int) -> str:
        """Return the name of an image, such as the path of its file; "image 5" of the test split is "test image 5"."""
        number, place = self.locate(position)
        part = self.parts[number]
        named = part.names is not None if isinstance(part, TensorImages) else hasattr(part.source, "name")
        return part.name(place) if named or not number else f"{self.labels[number]} {part.name(place)}"

    def image(self, position: int) -> Tensor:
        """Return the pixels of a whole image, uint8 ``[C, h, w]``."""
        number, place = self.locate(position)
        batch = self.parts[number][[place]]
        height, width = batch.pixels.shape[2:] if batch.sizes is None else batch.sizes[0].tolist()
        return batch.pixels[0, :, :height, :width].cpu()

    def small_copies(self) -> SmallCopies:
        """Read all images once, and return a small copy of each."""
        gray = torch.empty(len(self), SIDE, SIDE, dtype=torch.uint8)
        color = torch.empty(len(self), 3, COLOR_SIDE, COLOR_SIDE, dtype=torch.uint8)
        sizes, hashes = torch.empty(len(self), 2, dtype=torch.int64), list[bytes]()
        for part in filter(len, self.parts):
            add_steps(total=len(part))
            start = len(hashes)
            for batch in in_order(part):
                rows = slice(len(hashes), len(hashes) + len(batch.ids))
                sizes[rows] = torch.tensor(batch.pixels.shape[2:]) if batch.sizes is None else batch.sizes
                scaled = _scaled(batch, sizes[rows])
                gray[rows] = _in_gray(scaled)
                color[rows] = F.adaptive_avg_pool2d(_in_color(scaled), COLOR_SIDE).round().to(torch.uint8)
                hashes += pixel_hashes(batch)
                # Another image replaces one that has become unreadable, and would be taken for its duplicate.
                for row in (batch.ids != torch.arange(rows.start - start, rows.stop - start)).nonzero().flatten():
                    place = rows.start + int(row)
                    gray[place], hashes[place] = 0, f"unreadable {place}".encode()
                add_steps(done=len(batch.ids))
        return SmallCopies(gray, color, sizes, hashes)


def _scaled(batch: Batch, sizes: Tensor) -> Tensor:
    """Whole images scaled to fp32 ``[N, C, 64, 64]`` in [0, 255], on the CPU."""
    scaled = torch.empty(len(sizes), batch.pixels.shape[1], SIDE, SIDE)
    for height, width in sizes.unique(dim=0).tolist():  # images of the same size are scaled together
        rows = ((sizes[:, 0] == height) & (sizes[:, 1] == width)).nonzero().flatten()
        images = batch.pixels[rows.to(batch.pixels.device), :, :height, :width].cpu().float()
        scaled[rows] = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    return scaled.clamp(0, 255)


def _in_gray(pixels: Tensor) -> Tensor:
    """Luma of three channels, or the mean of another number of channels, uint8 ``[N, S, S]``."""
    if pixels.shape[1] == 3:
        return fit_channels(pixels.round().to(torch.uint8), 1)[:, 0]
    return pixels.mean(1).round().to(torch.uint8)


def _in_color(pixels: Tensor) -> Tensor:
    """Three channels; with another number of channels, the mean of all of them, three times."""
    return pixels if pixels.shape[1] == 3 else pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
