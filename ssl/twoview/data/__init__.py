"""Images as uint8 with their index: decoded once, one square size a run."""

from twoview.data.images import Batch, BatchOrder, ImageArrays, ImageData, Preprocess, fit_channels, fit_size
from twoview.data.named import cifar10, cifar100, digits, fake, stl10

__all__ = [
    "Batch",
    "BatchOrder",
    "ImageArrays",
    "ImageData",
    "Preprocess",
    "cifar10",
    "cifar100",
    "digits",
    "fake",
    "fit_channels",
    "fit_size",
    "stl10",
]
