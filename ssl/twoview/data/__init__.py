"""Images as uint8 with their index: decoded once, one square size a run."""

from twoview.data.decode import square
from twoview.data.folder import Pictures, folder, from_dataset
from twoview.data.images import (
    Batch,
    BatchOrder,
    ImageArrays,
    ImageData,
    Images,
    Preprocess,
    fit_channels,
    fit_size,
    in_order,
)
from twoview.data.named import cifar10, cifar100, digits, fake, stl10

__all__ = [
    "Batch",
    "BatchOrder",
    "ImageArrays",
    "ImageData",
    "Images",
    "Pictures",
    "Preprocess",
    "cifar10",
    "cifar100",
    "digits",
    "fake",
    "fit_channels",
    "fit_size",
    "folder",
    "from_dataset",
    "in_order",
    "square",
    "stl10",
]
