"""Preprocessing for evaluation and deployment, center squares, and conversion of image size and channels."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from twoview.data.decode import Shape, luma, square, square_and_shape, whole, whole_and_shape
from twoview.errors import require, require_at_least

MAX_SIZE = 2**14  # of stored images in pixels, 800 MB each


def fit_size(pixels: Tensor, size: int) -> Tensor:
    """Resize images by bilinear interpolation with antialiasing; images that have the size are returned unchanged.

    Args:
        pixels: uint8 ``[N, C, H, W]``.
        size: height and width of the result in pixels.

    Returns:
        uint8 ``[N, C, size, size]``.
    """
    if pixels.shape[2:] == (size, size):
        return pixels
    parts = [F.interpolate(p.float(), (size, size), mode="bilinear", antialias=True) for p in pixels.split(1024)]
    return torch.cat([p.round().clamp(0, 255).to(torch.uint8) for p in parts])


def center_squares(pixels: Tensor, sizes: Tensor | None, size: int) -> Tensor:
    """Crop the center square of each image, and resize it as :func:`fit_size` does.

    Args:
        pixels: uint8 ``[N, C, H, W]``, canvases with the images in their top left corners.
        sizes: int64 ``[N, 2]``, height and width of each image; None if the images fill their canvases.
        size: height and width of the result in pixels.

    Returns:
        uint8 ``[N, C, size, size]``.
    """
    if sizes is None:
        return fit_size(_center(pixels, *pixels.shape[2:]), size)
    squares = pixels.new_empty(len(pixels), pixels.shape[1], size, size)
    sides = sizes.amin(1)
    for side in sides.unique():  # squares of the same size are resized together
        rows = (sides == side).nonzero().flatten().tolist()
        cropped = torch.stack([_center(pixels[row], *sizes[row].tolist()) for row in rows])
        squares[rows] = fit_size(cropped, size)
    return squares


def _center(pixels: Tensor, height: int, width: int) -> Tensor:
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[..., top : top + side, left : left + side]


def fit_channels(pixels: Tensor, channels: int) -> Tensor:
    """Convert one channel to three by repetition, or three channels to one by their luma (ITU-R BT.601).

    Args:
        pixels: uint8 ``[N, C, H, W]``.
        channels: number of channels of the result.

    Returns:
        uint8 ``[N, channels, H, W]``.

    Raises:
        UserError: if another change of the number of channels is needed.
    """
    have = pixels.shape[1]
    if have == channels:
        return pixels
    if (have, channels) == (1, 3):
        return pixels.expand(-1, 3, -1, -1).contiguous()
    require((have, channels) == (3, 1), f"data.channels={channels}: these images have {have}; only 1 and 3 convert")
    return torch.cat([luma(p).round().to(torch.uint8) for p in pixels.split(1024)])


def stored_size(image_size: int, store_size: int | None) -> int:
    """Return the largest height and width in pixels at which images are stored.

    Args:
        image_size: height and width of the network's input in pixels, at least 8.
        store_size: the size that was asked for, at least ``image_size``; None for twice ``image_size``.

    Raises:
        UserError: if a size is too small.
    """
    require_at_least("data", 8, image_size=image_size)
    size = store_size or 2 * image_size
    require(size <= MAX_SIZE, f"data.store_size={size}: must be at most {MAX_SIZE}")
    require(size >= image_size, f"data.store_size={store_size}: must be at least data.image_size={image_size}, or null")
    return size


def resized_size(image_size: int, store_size: int) -> int:
    """Return the short side in pixels that whole images are resized to before the center crop.

    Args:
        image_size: height and width of the crop in pixels.
        store_size: largest height and width of the stored images in pixels, at least ``image_size``.
    """
    return min(store_size, round(1.15 * image_size))


class Preprocess(nn.Module):
    """Reduce the image, crop and resize its center square, crop the center, scale to [0, 1] and normalize.

    The same steps are applied to images of the evaluation, which are stored on canvases, and to images in deployment:

    1. the whole image is reduced to a long side of at most ``store_size``, see :func:`twoview.data.whole`;
    2. its center square is resized to ``resize_size``;
    3. the center of ``image_size`` is cropped, scaled and normalized.

    Args:
        image_size: height and width of the result in pixels.
        mean: mean of each of the C channels on the scale [0, 1].
        std: standard deviation of each channel on the same scale.
        store_size: largest height and width of an image before its center square is cropped; larger images are reduced.
            None to reduce no image before.
        resize_size: height and width that the center square is resized to, at least ``image_size``; None for
            ``image_size``.

    Raises:
        UserError: if ``resize_size`` is smaller than ``image_size``.

    Example:
        >>> preprocess = Preprocess(8, [0.5] * 3, [0.25] * 3, store_size=16, resize_size=9)
        >>> preprocess(Image.new("RGB", (50, 40))).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        store_size: int | None = None,
        resize_size: int | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.store_size, self.resize_size = image_size, store_size, resize_size or image_size
        message = f"must be at least image_size={image_size}"
        require(self.resize_size >= image_size, f"resize_size={resize_size}: {message}")
        self.mean = nn.Buffer(torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.std = nn.Buffer(torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    @property
    def plain(self) -> dict[str, Any]:
        """The arguments as plain values, such as for the metadata of a file; ``resize_size`` is a number."""
        sizes = {"image_size": self.image_size, "store_size": self.store_size, "resize_size": self.resize_size}
        return {**sizes, "mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}

    def forward(self, images: Tensor | Image.Image, sizes: Tensor | None = None) -> Tensor:
        """Preprocess images.

        Args:
            images: uint8 ``[N, C, H, W]`` or ``[C, H, W]``, or one PIL image. A JPEG file that is opened and not yet
                loaded gives the pixels of the stored image; Pillow then decodes it at a reduced size.
            sizes: int64 ``[N, 2]``, height and width of each image, if ``images`` are canvases of
                :class:`twoview.data.Batch`; None for whole images.

        Returns:
            fp32 ``[N, C, image_size, image_size]``, on the device of this module.

        Raises:
            TypeError: if ``images`` is a tensor that is not uint8.
            UserError: if the number of channels is not C, and the images cannot be converted between 1 and 3 channels.
        """
        return self.normalized(self.crops(images, sizes))

    def normalized(self, crops: Tensor) -> Tensor:
        """Scale the pixels that :meth:`crops` returns to [0, 1] and normalize them, on the device of this module."""
        return crops.to(self.mean.device).float().div_(255).sub_(self.mean).div_(self.std)

    def crops(self, images: Tensor | Image.Image, sizes: Tensor | None = None) -> Tensor:
        """Return the pixels before normalization, uint8 ``[N, C, image_size, image_size]``, as :meth:`forward` does."""
        top = (self.resize_size - self.image_size) // 2
        return self.squares(images, sizes)[..., top : top + self.image_size, top : top + self.image_size]

    def decoded(self, item: Any) -> tuple[Tensor, Shape]:
        """Decode one image in any form that :func:`twoview.data.whole` takes, such as the path of a file.

        Returns:
            The pixels that :meth:`crops` gives for the image, uint8 ``[C, image_size, image_size]``; and its original
            height, width and number of channels, upright.

        Raises:
            OSError, ValueError, SyntaxError, or any other error of Pillow: as for :func:`twoview.data.whole`.
        """
        if self.store_size is None:
            pixels, shape = square_and_shape(item, self.resize_size, len(self.mean))
        else:
            pixels, shape = whole_and_shape(item, self.store_size, len(self.mean))
        return self.crops(pixels)[0], shape

    def squares(self, images: Tensor | Image.Image, sizes: Tensor | None = None) -> Tensor:
        """Return the center squares before the last crop, uint8 ``[N, C, resize_size, resize_size]``."""
        if isinstance(images, Image.Image):
            return center_squares(self._reduced(images)[None], None, self.resize_size)
        if images.dtype != torch.uint8:
            raise TypeError(f"Preprocess takes uint8 images in [0, 255], not {images.dtype}")
        images = fit_channels(images[None] if images.ndim == 3 else images, len(self.mean))
        if sizes is None and not self._fits(*images.shape[2:]):
            images = torch.stack([self._reduced(image) for image in images.cpu()])
        return center_squares(images, sizes, self.resize_size)

    def _fits(self, height: int, width: int) -> bool:
        """Whether a tensor needs no reduction before its center square is cropped."""
        if self.store_size is None:
            return height == width == self.resize_size
        return max(height, width) <= self.store_size

    def _reduced(self, image: Tensor | Image.Image) -> Tensor:
        """Decode an image to uint8 ``[C, h, w]``, at once to its center square if there is no ``store_size``."""
        if self.store_size is None:
            return square(image, self.resize_size, len(self.mean))
        return whole(image, self.store_size, len(self.mean))
