"""Projection of pixels to fewer features, for the baseline "raw pixels"."""

from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor

from twoview.data import fixed_sample
from twoview.evaluation.moments import ROWS, Moments, pixel_moments

DIRECTIONS = 512  # number of features of projected pixels
IMAGES = ROWS  # smallest number of training images whose pixels are projected; those of fewer images take seconds


class Projection(NamedTuple):
    """Projection of pixels to their first K principal directions.

    The directions are those of the matrix of second moments, which is not centered. The projection is a rotation that
    leaves out the other directions. Lengths and cosine similarities of images are therefore kept up to the share of the
    squared length that is left out.

    Attributes:
        basis: fp32 ``[F, K]`` on the CPU, orthonormal columns.
        share: share of the squared length of the pixels that is kept, in [0, 1].
        scale: root mean square of the standard deviations of the pixels. Linear probes divide all features by it:
            pixels have nearly equal standard deviations, but principal directions have not, and to divide each by its
            own would change the penalty.
        moments: moments of the F pixels in [0, 1].
    """

    basis: Tensor
    share: float
    scale: float
    moments: Moments

    def facts(self) -> dict[str, float]:
        """Return ``pixels`` F, ``directions`` K, ``images`` from which they are computed, and ``share``."""
        pixels, directions = self.basis.shape
        return {"pixels": pixels, "directions": directions, "images": self.moments.rows, "share": self.share}


def fit_projection(pixels: Tensor, device: torch.device | None = None, directions: int = DIRECTIONS) -> Projection:
    """Compute the projection of pixels from at most 20,000 images.

    Args:
        pixels: uint8 ``[N, C, s, s]``, training images, at least as many as an image has pixels.
        device: device of the run; see :func:`twoview.evaluation.moments.device_of_float64`.
        directions: number K of directions, at most C * s * s.

    Example:
        >>> images = torch.randint(0, 256, (50, 1, 2, 2), dtype=torch.uint8)
        >>> fit_projection(images, directions=3).basis.shape
        torch.Size([4, 3])
    """
    moments = pixel_moments(pixels[fixed_sample(len(pixels), ROWS)].flatten(1), device)
    gram = moments.gram()
    basis = _principal_directions(gram, directions)
    kept, whole = (gram.float() @ basis * basis).sum(dtype=torch.float64), gram.trace()
    scale = float(moments.variance.mean().sqrt()) or 1.0
    return Projection(basis.cpu(), min(1.0, float(kept) / (float(whole) or 1.0)), scale, moments)


def projects(images: int, pixels: int) -> bool:
    """Whether the pixels of so many training images, so many of each, are projected."""
    return images >= IMAGES and DIRECTIONS < pixels < ROWS


def _principal_directions(gram: Tensor, count: int) -> Tensor:
    """The first principal directions fp32 ``[F, count]`` of a matrix float64 ``[F, F]``, each a column."""
    if gram.is_cuda:
        vectors: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -count:]
    else:  # to compute only some eigenvectors takes a third of the time
        last = len(gram) - 1
        vectors = torch.from_numpy(scipy.linalg.eigh(gram.float().numpy(), subset_by_index=[last + 1 - count, last])[1])
    # In fp32, LAPACK's vectors are orthonormal up to 1e-4 only.
    basis: Tensor = torch.linalg.qr(vectors.float().flip(1)).Q
    return basis
