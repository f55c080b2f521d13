"""Data sets by name: scikit-learn's digits, which are always there, and torchvision's."""

import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets

from twoview.data.images import ImageArrays, ImageData, fit_channels, fit_size
from twoview.errors import UserError

STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def digits(
    image_size: int = 32, channels: int = 1, batch_size: int = 128, mirror: bool = False, least_crop: float = 0.3
) -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, resized; a fixed stratified split of 1,347 and 450.

    Args:
        image_size: height and width after resizing, in pixels.
        channels: 1 or 3.
        batch_size: global batch of pretraining.
        mirror: whether views may be mirrored; a mirrored digit is another shape or none.
        least_crop: least share of a digit in a view; a smaller part may be of any digit.
    """
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=450, stratify=labels, random_state=0)
    learn, judge = (_arrays(pixels[i], labels[i], image_size, channels) for i in (train, test))
    return ImageData(learn, learn, judge, [str(i) for i in range(10)], batch_size, "digits", mirror, least_crop)


def fake(
    image_size: int = 32, channels: int = 3, batch_size: int = 256, images: int = 2048, classes: int = 10
) -> ImageData:
    """Noise with labels, for speed tests; the class shifts the brightness a little, so that there is something to find.

    Args:
        image_size: height and width in pixels.
        channels: any number.
        batch_size: global batch of pretraining.
        images: number of training images; a quarter as many test images.
        classes: number of classes.
    """
    if classes < 2:
        raise UserError(f"data.classes={classes}: must be at least 2")
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> ImageArrays:
        labels = torch.arange(count) % classes
        noise = torch.randint(0, 156, (count, channels, image_size, image_size), generator=generator)
        return ImageArrays((noise + (100 * labels // classes).view(-1, 1, 1, 1)).to(torch.uint8), labels)

    train, test = split(images), split(max(images // 4, classes))
    return ImageData(train, train, test, [str(i) for i in range(classes)], batch_size, name="fake")


def cifar10(
    root: str | Path, download: bool = True, image_size: int = 32, channels: int = 3, batch_size: int = 512
) -> ImageData:
    """CIFAR-10 from ``root``, fetched there if missing: 50,000 and 10,000 images of 32x32 pixels.

    Args:
        root: folder that holds, or will hold, ``cifar-10-batches-py``.
        download: fetch what is missing.
        image_size: height and width after resizing, in pixels.
        channels: 1 or 3.
        batch_size: global batch of pretraining.

    Raises:
        UserError: the files are neither there nor to be had.
    """
    return _cifar(datasets.CIFAR10, "cifar10", root, download, image_size, channels, batch_size)


def cifar100(
    root: str | Path, download: bool = True, image_size: int = 32, channels: int = 3, batch_size: int = 512
) -> ImageData:
    """CIFAR-100, as :func:`cifar10`; the folder is ``cifar-100-python``."""
    return _cifar(datasets.CIFAR100, "cifar100", root, download, image_size, channels, batch_size)


def stl10(
    root: str | Path, download: bool = True, image_size: int = 96, channels: int = 3, batch_size: int = 256
) -> ImageData:
    """STL-10: 100,000 unlabelled images to learn from, 5,000 and 8,000 labelled ones in ``stl10_binary``."""

    def split(name: str) -> ImageArrays:
        found = _fetch(datasets.STL10, "stl10", root, download, split=name)
        return _arrays(
            torch.from_numpy(found.data), torch.from_numpy(np.asarray(found.labels)).long(), image_size, channels
        )

    return ImageData(split("unlabeled"), split("train"), split("test"), STL10_CLASSES, batch_size, name="stl10")


def _cifar(
    kind: Any, name: str, root: str | Path, download: bool, image_size: int, channels: int, batch_size: int
) -> ImageData:
    found = [_fetch(kind, name, root, download, train=train) for train in (True, False)]
    train, test = (
        _arrays(torch.from_numpy(d.data).permute(0, 3, 1, 2), torch.tensor(d.targets), image_size, channels)
        for d in found
    )
    return ImageData(train, train, test, found[0].classes, batch_size, name=name)


def _fetch(kind: Any, name: str, root: str | Path, download: bool, **which: Any) -> Any:
    root = Path(str(root)).expanduser()
    try:
        return kind(root, **which)
    except RuntimeError:  # torchvision: not found or corrupted
        advice = f"put its files there, or give your own pictures with data=folder data.root={root}"
        if not download:
            raise UserError(f"data.root={root}: {name} is not there and data.download=false; {advice}") from None
    try:
        # Before a folder is made for nothing.
        urllib.request.urlopen(kind.url, timeout=10).close()
        return kind(root, download=True, **which)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.root={root}: {name} is not there and could not be downloaded from {kind.url} ({error}); {advice}"
        ) from error


def _arrays(pixels: torch.Tensor, labels: torch.Tensor, image_size: int, channels: int) -> ImageArrays:
    if image_size < 8:
        raise UserError(f"data.image_size={image_size}: must be at least 8")
    return ImageArrays(fit_size(fit_channels(pixels.contiguous(), channels), image_size), labels)
