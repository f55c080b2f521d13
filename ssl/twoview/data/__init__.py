"""Images as uint8 with their index: decoded once, one square size a run."""

from twoview.data.decode import square
from twoview.data.folder import folder
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
    split_labels,
)
from twoview.data.named import cifar10, cifar100, digits, fake, stl10
from twoview.data.pictures import Pictures, from_dataset
from twoview.data.shards import parquet, webdataset

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
    "parquet",
    "split_labels",
    "square",
    "stl10",
    "webdataset",
]
