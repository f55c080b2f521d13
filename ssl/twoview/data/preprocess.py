"""Preprocessing for evaluation and deployment, and conversion of image size and channels."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from twoview.data.decode import luma, square
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
    """Return the height and width in pixels at which images are stored.

    Args:
        image_size: height and width of the network's input in pixels, at least 8.
        store_size: height and width of the stored images in pixels, at least ``image_size``; None for 1.15 times
            ``image_size``.

    Raises:
        UserError: if a size is too small.
    """
    require_at_least("data", 8, image_size=image_size)
    size = store_size or round(1.15 * image_size)
    require(size <= MAX_SIZE, f"data.store_size={size}: must be at most {MAX_SIZE}")
    require(size >= image_size, f"data.store_size={store_size}: must be at least data.image_size={image_size}, or null")
    return size


class Preprocess(nn.Module):
    """Resize the short side, crop the center square, scale to [0, 1] and normalize.

    Args:
        image_size: height and width of the result in pixels.
        mean: mean of each of the C channels on the scale [0, 1].
        std: standard deviation of each channel on the same scale.
        store_size: size in pixels that the short side is resized to before cropping; None for ``image_size``.
    """

    def __init__(
        self, image_size: int, mean: Sequence[float], std: Sequence[float], store_size: int | None = None
    ) -> None:
        super().__init__()
        self.image_size, self.store_size = image_size, store_size or image_size
        self.mean = nn.Buffer(torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.std = nn.Buffer(torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor | Image.Image) -> Tensor:
        """Preprocess images.

        Args:
            images: uint8 ``[N, C, H, W]`` or ``[C, H, W]``, or one PIL image.

        Returns:
            fp32 ``[N, C, image_size, image_size]``, on the device of this module.

        Raises:
            TypeError: if ``images`` is a tensor that is not uint8.
            UserError: if the number of channels is not C, and the images cannot be converted between 1 and 3 channels.
        """
        channels = len(self.mean)
        if isinstance(images, Image.Image):
            images = square(images, self.store_size, channels)
        if images.dtype != torch.uint8:
            raise TypeError(f"Preprocess takes uint8 images in [0, 255], not {images.dtype}")
        images = fit_channels(images[None] if images.ndim == 3 else images, channels)
        if tuple(images.shape[2:]) != (self.store_size, self.store_size):
            images = torch.stack([square(image, self.store_size, channels) for image in images.cpu()])
        top = (self.store_size - self.image_size) // 2
        pixels = images[:, :, top : top + self.image_size, top : top + self.image_size].to(self.mean.device)
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)
