"""Data sets by name: the digits of scikit-learn, three data sets of torchvision, and noise."""

import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twoview.data.image_data import ImageData
from twoview.data.images import TensorImages
from twoview.data.preprocess import fit_channels, fit_size, stored_size
from twoview.devices import require_memory
from twoview.errors import UserError, require, require_at_least

STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def digits(
    image_size: int = 32, channels: int = 1, batch_size: int = 128, allow_flip: bool = False, min_crop_area: float = 0.3
) -> ImageData:
    """Load scikit-learn's 1,797 handwritten digits of 8x8 pixels.

    A fixed split, stratified by class, gives 1,347 training and 450 test images.

    Args:
        image_size: height and width in pixels that the images are resized to.
        channels: 1 or 3.
        batch_size: global batch size of pretraining.
        allow_flip: whether horizontal flips preserve the meaning of the images; a flipped digit is another digit or no
            digit.
        min_crop_area: smallest share of the area of an image that a crop may have, in [0, 1]; smaller parts of
            different digits look alike.

    Raises:
        UserError: if ``image_size`` is below 8, or ``channels`` is neither 1 nor 3.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)[:, None]
    split = train_test_split(np.arange(len(pixels)), test_size=450, stratify=bunch.target, random_state=0)
    train, test = (_resized(pixels[i], bunch.target[i], image_size, channels) for i in split)
    return ImageData(train, train, test, [str(i) for i in range(10)], batch_size, "digits", allow_flip, min_crop_area)


def fake(
    image_size: int = 32, channels: int = 3, batch_size: int = 256, images: int = 2048, classes: int = 10
) -> ImageData:
    """Generate images of noise for speed tests; their mean brightness depends on the class.

    Args:
        image_size: height and width in pixels.
        channels: number of channels, at least 1.
        batch_size: global batch size of pretraining.
        images: number of training images. The number of test images is a quarter of it, but at least ``classes``.
        classes: number of classes, at least 2.

    Raises:
        UserError: if ``classes`` or ``images`` is below 2, a size is below 1, or the images do not fit in memory.
    """
    require_at_least("data", 2, classes=classes, images=images)
    require_at_least("data", 1, image_size=image_size, channels=channels)
    # While the images are drawn, a pixel takes 9 bytes.
    needed = 9 * images * channels * image_size**2
    require_memory(f"data.images={images} data.image_size={image_size}", needed, "choose fewer or smaller images")
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> TensorImages:
        labels = torch.arange(count) % classes
        noise = torch.randint(0, 156, (count, channels, image_size, image_size), generator=generator)
        return TensorImages(noise.add_((100 * labels // classes).view(-1, 1, 1, 1)).to(torch.uint8), labels)

    train, test = split(images), split(max(images // 4, classes))
    return ImageData(train, train, test, [str(i) for i in range(classes)], batch_size, name="fake")


def cifar10(
    root: str | Path = "data", download: bool = True, image_size: int = 32, channels: int = 3, batch_size: int = 512
) -> ImageData:
    """Load CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels.

    Args:
        root: folder that contains ``cifar-10-batches-py``.
        download: whether to download the files to ``root`` if they are missing.
        image_size: height and width in pixels that the images are resized to.
        channels: 1 or 3.
        batch_size: global batch size of pretraining.

    Raises:
        UserError: if the files are missing and cannot be downloaded, ``image_size`` is below 8, or ``channels`` is
            neither 1 nor 3.
    """
    return _cifar("cifar10", root, download, image_size, channels, batch_size)


def cifar100(
    root: str | Path = "data", download: bool = True, image_size: int = 32, channels: int = 3, batch_size: int = 512
) -> ImageData:
    """Load CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels.

    The arguments are those of :func:`cifar10`, except that ``root`` contains the folder ``cifar-100-python``.
    """
    return _cifar("cifar100", root, download, image_size, channels, batch_size)


def stl10(
    root: str | Path = "data", download: bool = True, image_size: int = 96, channels: int = 3, batch_size: int = 256
) -> ImageData:
    """Load STL-10: 100,000 unlabeled images of 96x96 pixels for pretraining, 5,000 training and 8,000 test images.

    The arguments are those of :func:`cifar10`, except that ``root`` contains the folder ``stl10_binary``.
    """

    def split(name: str) -> TensorImages:
        found = _load("stl10", root, download, split=name)
        return _resized(found.data, found.labels, image_size, channels)

    return ImageData(split("unlabeled"), split("train"), split("test"), STL10_CLASSES, batch_size, name="stl10")


def _cifar(name: str, root: str | Path, download: bool, image_size: int, channels: int, batch_size: int) -> ImageData:
    found = [_load(name, root, download, train=train) for train in (True, False)]
    train, test = (_resized(d.data.transpose(0, 3, 1, 2), d.targets, image_size, channels) for d in found)
    return ImageData(train, train, test, found[0].classes, batch_size, name=name)


def _load(name: str, root: str | Path, download: bool, **which: Any) -> Any:
    from torchvision import datasets

    kind, root = getattr(datasets, name.upper()), Path(str(root)).expanduser()
    with suppress(RuntimeError):  # raised by torchvision if files are missing or corrupted
        return kind(root, **which)
    advice = f"put its files there, or give your own images with data=folder data.root={root}"
    require(download, f"data.root={root}: {name} is not there and data.download=false; {advice}")
    try:
        # Check the connection first: torchvision would create an empty folder.
        urllib.request.urlopen(kind.url, timeout=10).close()
        return kind(root, download=True, **which)
    except (OSError, RuntimeError) as error:
        message = f"{name} is not there and could not be downloaded from {kind.url} ({error})"
        raise UserError(f"data.root={root}: {message}; {advice}") from error


def _resized(pixels: np.ndarray, labels: Any, image_size: int, channels: int) -> TensorImages:
    size = stored_size(image_size, store_size=image_size)
    require_memory(f"data.image_size={image_size}", len(pixels) * channels * size**2, "choose a smaller one")
    stored = torch.from_numpy(np.ascontiguousarray(pixels))
    return TensorImages(fit_size(fit_channels(stored, channels), size), torch.as_tensor(labels).long())
