"""Comparison of images by their pixels: hashes of equal images, and the conditions of near duplicates."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.data import Batch

# Conditions of near duplicates, see is_near. docs/evaluation.md and docs/duplicates.md state how many copies are found
# with these values, and how many other images are reported.
MAX_DIFFERENCE = 18.0
CERTAIN = 8.0
RATIO = 3.0
MIN_CORRELATION = 0.85


class Agreement(NamedTuple):
    """How similar the pixels of pairs of images are, fp32 ``[...]`` each.

    Attributes:
        difference: root mean square (RMS) difference, in gray levels.
        correlation: correlation of the pixels, in [-1, 1].
        contrast: the larger of the standard deviations of both images, in gray levels.
    """

    difference: Tensor
    correlation: Tensor
    contrast: Tensor


def pixel_hashes(batch: Batch) -> list[bytes]:
    """Return a hash of each whole image of a batch; it is equal if all pixels, height and width are equal."""
    sizes = [batch.pixels.shape[2:]] * len(batch.ids) if batch.sizes is None else batch.sizes.tolist()
    return [_hash(image[:, :h, :w]) for image, (h, w) in zip(batch.pixels.cpu(), sizes, strict=True)]


def _hash(pixels: Tensor) -> bytes:
    """Hash of an image uint8 ``[C, H, W]``; images of other shapes may consist of the same bytes."""
    height, width = pixels.shape[1:]
    shape = b"" if height == width else f"{height} {width}".encode()
    return hashlib.blake2b(pixels.numpy().tobytes() + shape, digest_size=16).digest()


def agreement(ours: Tensor, theirs: Tensor, inside: Tensor | None = None) -> Agreement:
    """Compare images pixel by pixel.

    Args:
        ours: fp32 ``[..., P]``, P pixels of each image, in [0, 255].
        theirs: fp32, of a shape that broadcasts with ``ours``.
        inside: fp32 ``[..., P]``, 1 for pixels that are compared, 0 for others; None to compare all.

    Returns:
        Differences, correlations and contrasts. The correlation with an image of one gray level is 0.

    Example:
        >>> found = agreement(torch.tensor([10.0, 20.0, 30.0]), torch.tensor([20.0, 30.0, 40.0]))
        >>> round(float(found.difference), 3), round(float(found.correlation), 3)
        (10.0, 1.0)
    """
    weights = torch.ones_like(ours) if inside is None else inside
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    difference = ((theirs - ours).square() * weights).sum(-1).sqrt()
    a, b = ((x - (x * weights).sum(-1, keepdim=True)) * weights.sqrt() for x in (theirs, ours))
    contrast = torch.maximum(a.norm(dim=-1), b.norm(dim=-1))
    return Agreement(difference, F.cosine_similarity(a, b, dim=-1), contrast)


def is_near(difference: Tensor, correlation: Tensor, typical: Tensor) -> Tensor:
    """Decide which pairs are near duplicates, from the agreement of their pixels.

    A pair is a near duplicate if all of these conditions hold:

    * the correlation is above 0.85;
    * the RMS difference is below 18 gray levels (of 255);
    * the RMS difference is below 8 gray levels, or below a third of ``typical``.

    The last condition rejects different images that look alike, such as two digits of a class: an image is then not
    much nearer than the other candidates.

    Args:
        difference: ``[N]``, RMS differences in gray levels.
        correlation: ``[N]``.
        typical: ``[N]``, RMS difference to other candidates, which are no duplicates.

    Returns:
        bool ``[N]``.

    Example:
        >>> is_near(torch.tensor([5.0, 12.0, 12.0]), torch.tensor([0.9] * 3), torch.tensor([20.0, 30.0, 60.0]))
        tensor([ True, False,  True])
    """
    limit = (typical / RATIO).clamp(CERTAIN, MAX_DIFFERENCE)
    return (correlation > MIN_CORRELATION) & (difference < limit)
