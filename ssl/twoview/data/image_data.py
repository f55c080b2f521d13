"""All images of a run: a split for pretraining, and labeled training and test splits for the evaluation."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from twoview.data.decode import whole
from twoview.data.images import Images, LazyImages, TensorImages
from twoview.data.preprocess import resized_size, stored_size
from twoview.errors import UserError, require


class ImageData:
    """All images of a run.

    Args:
        pretrain: images to pretrain on; only supervised methods use their labels.
        train: labeled training images of the evaluation, often the same object as ``pretrain``; None for no
            evaluation.
        test: labeled test images of the evaluation, whose labels are read once; None for no evaluation.
        classes: names of the classes.
        batch_size: global batch size of pretraining, over all ranks, before accumulation; also the batch size of the
            evaluation.
        name: name of the data set, for reports.
        allow_flip: whether horizontal flips preserve the meaning of the images.
        min_crop_area: smallest share of the area of an image that a crop may have, in [0, 1].
        image_size: height and width of the network's input in pixels; None for the size of the stored images.
        store_size: largest height and width that whole images were reduced to, in pixels; None for squares, or for the
            size of the canvases if there are images that do not fill them.

    Attributes:
        channels: number of channels C.
        store_size: as the argument; None if the images are squares that were not cut from larger images here.
        broken: name of each file that could not be read, and the reason.

    Raises:
        UserError: if a label of ``train`` or ``test`` is out of range.
    """

    def __init__(  # noqa: PLR0913
        self,
        pretrain: Images,
        train: Images | None,
        test: Images | None,
        classes: Sequence[str],
        batch_size: int = 256,
        name: str = "images",
        allow_flip: bool = True,
        min_crop_area: float = 0.0,
        image_size: int | None = None,
        store_size: int | None = None,
    ) -> None:
        for split, images in (("training", train), ("test", test)):
            known = images is None or 0 <= int(images.labels.min()) <= int(images.labels.max()) < len(classes)
            require(known, f"{name}: {split} labels must lie in 0 to {len(classes) - 1} for {len(classes)} classes")
        self.pretrain, self.train, self.test = pretrain, train, test
        self.classes, self.batch_size, self.name = list(classes), batch_size, name
        self.allow_flip, self.min_crop_area = allow_flip, min_crop_area
        self.image_size, self.channels = image_size or pretrain.size, pretrain.channels
        squares = isinstance(pretrain, TensorImages) and pretrain.sizes is None
        self.store_size = store_size or (None if squares else pretrain.size)
        self.broken: list[tuple[str, str]] = []

    @property
    def labelled(self) -> tuple[Images, Images]:
        """Labeled training and test images.

        Raises:
            UserError: if there are no labeled images.
        """
        if self.train is None or self.test is None:
            advice = "give folders of classes, or a .csv list with the column label, as data.root or data.eval_root"
            raise UserError(f"data: {self.name} has no labels to fit and test a probe with; {advice}")
        return self.train, self.test

    @property
    def splits(self) -> dict[str, Images]:
        """Splits that hold every image once, by name; training images that are pretraining images are left out."""
        found = {"pretrain": self.pretrain}
        # As in hide_labels: the labeled part of ``pretrain`` holds the same images.
        if self.train is not None and int((self.pretrain.labels >= 0).sum()) != len(self.train):
            found["train"] = self.train
        return found if self.test is None else found | {"test": self.test}

    @property
    def resize_size(self) -> int:
        """Height and width that the center square of an image is resized to, see :class:`twoview.data.Preprocess`."""
        if self.store_size is None:
            return max(self.pretrain.size, self.image_size)
        return max(resized_size(self.image_size, self.store_size), self.image_size)

    @cached_property
    def mean_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the pretraining images, on the scale [0, 1]."""
        mean, mean_square = self.pretrain.statistics()[:, :2].mean(0)
        return mean.tolist(), (mean_square - mean**2).clamp(min=1e-6).sqrt().tolist()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the statistics and labels of all images, in their order."""
        return _hash(*(split for split in (self.pretrain, self.train, self.test) if split is not None))

    @cached_property
    def test_fingerprint(self) -> str | None:
        """Hash of the statistics and labels of the test images, in their order; None without test images."""
        return None if self.test is None else _hash(self.test)

    def view_limits(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> dict[str, Any]:
        """Return the arguments of :class:`twoview.augment.TwoViews` that depend on the images.

        Args:
            mean: mean of each channel for the normalization, on the scale [0, 1]; None for the mean of these images.
            std: standard deviation of each channel on the same scale; None for the standard deviation of these images.

        Returns:
            ``image_size``, ``channels``, ``mean``, ``std``, ``allow_flip`` and ``min_crop_area``.
        """
        mean, std = mean or self.mean_std[0], std or self.mean_std[1]
        size = {"image_size": self.image_size, "channels": self.channels, "mean": mean, "std": std}
        return {**size, "allow_flip": self.allow_flip, "min_crop_area": self.min_crop_area}

    def hide_labels(self, positions: Tensor) -> None:
        """Set the labels of held-out images to -1 in ``pretrain``, so that these images can be used for choices.

        Nothing changes if ``train`` is a different set of images than the labeled part of ``pretrain``.

        Args:
            positions: int64 ``[M]``, positions of the held-out images in ``train``.
        """
        known = torch.nonzero(self.pretrain.labels >= 0).flatten()
        if self.train is not None and len(known) == len(self.train):  # the same images, in the same order
            labels = self.pretrain.labels.clone()
            labels[known[positions]] = -1
            self.pretrain = self.pretrain.with_labels(labels)


def _hash(*splits: Images) -> str:
    content = b"".join(t.numpy().tobytes() for split in splits for t in (split.statistics(), split.labels))
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Items(Sequence[Any]):
    """Images of a torch Dataset whose items are images or tuples that begin with an image."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Any) -> Any:
        item = self.dataset[int(position)]
        return item[0] if isinstance(item, tuple | list) else item


def from_dataset(
    dataset: Any,
    image_size: int = 64,
    channels: int = 3,
    batch_size: int = 256,
    test: Any = None,
    store_size: int | None = None,
    num_workers: int = 0,
) -> ImageData:
    """Read the images of a torch Dataset whose items are images or tuples ``(image, label)``.

    The evaluation needs labels in both ``dataset`` and ``test``. Images are stored nowhere: they are asked for in every
    epoch, since the items may be random.

    Args:
        dataset: Dataset with ``len()``. An image has any form that :func:`twoview.data.whole` takes; a label is an
            integer.
        image_size: height and width of the network's input in pixels.
        channels: number of channels C.
        batch_size: global batch size of pretraining.
        test: labeled Dataset of test images, in the same form; None for no evaluation.
        store_size: largest height and width of the images in pixels; larger images are reduced, with their aspect
            ratio. None for twice ``image_size``.
        num_workers: number of loader processes.

    Raises:
        UserError: if the first item is not an image or a tuple of image and label, or a size is too small.
    """
    size = stored_size(image_size, store_size)

    def images(given: Any) -> LazyImages:
        first = given[0]
        labelled = isinstance(first, tuple | list) and len(first) > 1
        try:
            whole(Items(given)[0], size, channels)
            int(first[1] if labelled else 0)
        except Exception as error:
            message = f"the first item of {type(given).__name__} is not an image, or tuple of image and class ({error})"
            raise UserError(f"data: {message}; give PIL images, uint8, or floats in [0, 1], not normalized") from error
        labels = [int(given[i][1]) for i in range(len(given))] if labelled else [-1] * len(given)
        return LazyImages(Items(given), torch.tensor(labels), size, channels, num_workers)

    pretrain = images(dataset)
    tested = images(test) if test is not None and int(pretrain.labels.min()) >= 0 else None
    train = pretrain if tested is not None else None
    classes = [str(i) for i in range(1 + max(int(split.labels.max()) for split in (pretrain, tested or pretrain)))]
    name = type(dataset).__name__
    return ImageData(pretrain, train, tested, classes, batch_size, name, image_size=image_size, store_size=size)
