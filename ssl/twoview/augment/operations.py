"""Operations on batches of views, each equal to the operation of torchvision with the same parameters."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue in torchvision


def luma(views: Tensor) -> Tensor:
    """Convert RGB to grayscale, as ``torchvision.transforms.functional.rgb_to_grayscale``.

    Args:
        views: ``[M, 3, H, W]``.

    Returns:
        ``[M, 1, H, W]``.
    """
    red, green, blue = views.split(1, 1)
    gray: Tensor = red * LUMA[0]
    return gray.add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blend(views: Tensor, factor: Tensor, to_mean: Tensor, to_luma: Tensor) -> Tensor:
    """Change brightness, contrast or saturation, as the ``adjust_*`` functions of torchvision do.

    Each of them is ``factor * view + (1 - factor) * other``, clamped to [0, 1], where ``other`` is 0 for brightness,
    the mean of the luma for contrast, and the luma of each pixel for saturation. Images without three channels have no
    luma; their mean is that of all channels.

    Args:
        views: ``[M, C, H, W]`` in [0, 1]; changed in place.
        factor: ``[M, 1, 1, 1]``.
        to_mean: ``[M, 1, 1, 1]``, 1 - factor where the operation is contrast, else 0.
        to_luma: ``[M, 1, 1, 1]``, 1 - factor where the operation is saturation, else 0.

    Returns:
        ``views``.
    """
    if views.shape[1] == 3:
        gray = luma(views)
        mean = _means(gray)
        other = gray.mul_(to_luma).add_(mean.mul_(to_mean))
    else:
        other = _means(views).mul_(to_mean)
    return torch.addcmul(other, views, factor, out=views).clamp_(0, 1)


def _means(views: Tensor) -> Tensor:
    """Mean of each view, ``[M, 1, 1, 1]``, whose last bits do not depend on the number of views."""
    if len(views) > 1:
        return views.mean((1, 2, 3), keepdim=True)
    # On a CPU the pixels of a single view would be divided among the threads, and added up in another order.
    return views.expand(2, -1, -1, -1).mean((1, 2, 3), keepdim=True)[:1]


def shift_hue(views: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue, as ``torchvision.transforms.functional.adjust_hue``, without a conversion to HSV and back.

    The largest and the smallest channel of a pixel do not change. With the hue h in sixths of a turn, from 0 for red to
    2 for green and 4 for blue, and the chroma c = largest - smallest:

    * h = 1 + (green + blue - red - smallest) / c, its distance from red, with the sign of green - blue;
    * red = smallest + c * clamp(abs(h - 3) - 1, 0, 1), green = largest - c * clamp(abs(h - 2) - 1, 0, 1) and
      blue = largest - c * clamp(abs(h - 4) - 1, 0, 1), for h in [0, 6).

    Args:
        views: ``[M, 3, H, W]`` in [0, 1].
        turns: ``[M, 1, 1]``, shift of the hue in turns of the color circle.

    Returns:
        ``[M, 3, H, W]`` in [0, 1].
    """
    red, green, blue = views.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    # The hue of a gray pixel has no effect, since its chroma is 0.
    distance = (green + blue).sub_(red).sub_(smallest).div_(chroma.clamp(min=1e-12)).add_(1)
    hue = torch.copysign(distance, green - blue, out=distance).add_(turns * 6)
    hue.sub_((hue / 6).floor_(), alpha=6)
    red = torch.addcmul(smallest, chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1))
    green = torch.addcmul(largest, chroma, (hue - 2).abs_().sub_(1).clamp_(0, 1), value=-1)
    blue = torch.addcmul(largest, chroma, (hue - 4).abs_().sub_(1).clamp_(0, 1), value=-1)
    return torch.stack([red, green, blue], 1)


def gaussian_blur(views: Tensor, sigmas: Tensor, kernel_size: int, largest_sigma: float) -> Tensor:
    """Blur with a Gaussian kernel, as ``torchvision.transforms.functional.gaussian_blur``.

    Weights of pixels that are more than five standard deviations away, whose sum is below 1e-6, are left out.

    Args:
        views: ``[M, C, H, W]``; height and width must exceed half the kernel size.
        sigmas: ``[M]``, standard deviations in pixels, > 0.
        kernel_size: size of the kernel in pixels, odd.
        largest_sigma: largest of the standard deviations, which the host knows without reading them from the device.

    Returns:
        ``[M, C, H, W]``.
    """
    half = kernel_size // 2
    reach = min(half, math.ceil(5 * largest_sigma))
    distances = torch.arange(half + 1, device=views.device, dtype=views.dtype)
    weights = torch.exp(-0.5 * (distances / sigmas[:, None]).square())
    weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    # Sums of shifted images: a convolution of few channels is several times slower on a CPU.
    padded = F.pad(views, (reach,) * 4, mode="reflect")
    for axis, length in ((2, views.shape[2]), (3, views.shape[3])):
        total = padded.narrow(axis, reach, length) * weights[:, 0, None, None, None]
        for distance in range(1, reach + 1):
            weight = weights[:, distance, None, None, None]
            total.addcmul_(padded.narrow(axis, reach - distance, length), weight)
            total.addcmul_(padded.narrow(axis, reach + distance, length), weight)
        padded = total
    return padded


def solarize(views: Tensor) -> Tensor:
    """Invert all values from one half on, as ``torchvision.transforms.functional.solarize``.

    Args:
        views: ``[M, C, H, W]`` in [0, 1].

    Returns:
        ``[M, C, H, W]`` in [0, 1].
    """
    return torch.where(views >= 0.5, 1 - views, views)
