"""Images as uint8 tensors with labels, from named data sets, image files or a torch Dataset."""

from twoview.data.decode import square, whole
from twoview.data.folder import folder
from twoview.data.groups import read_groups
from twoview.data.image_data import ImageData, from_dataset
from twoview.data.images import Batch, Images, LazyImages, TensorImages, fixed_sample, in_order, split_holdout
from twoview.data.named import cifar10, cifar100, digits, fake, stl10
from twoview.data.parquet import parquet
from twoview.data.preprocess import Preprocess, center_squares, fit_channels, fit_size
from twoview.data.webdataset import webdataset

__all__ = [
    "cifar10",
    "cifar100",
    "digits",
    "fake",
    "folder",
    "from_dataset",
    "parquet",
    "stl10",
    "webdataset",
]
__all__ += ["Batch", "ImageData", "Images", "LazyImages", "TensorImages"]
__all__ += ["Preprocess", "center_squares", "fit_channels", "fit_size", "fixed_sample", "in_order", "split_holdout"]
__all__ += ["read_groups", "square", "whole"]
