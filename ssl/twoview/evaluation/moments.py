"""Mean and second moments of features or pixels, in float64 on the device of the run where it has float64."""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 20_000  # largest number of rows from which moments are computed
EXACT_ROWS = 1024  # sums of as many products of two integers in [-128, 128] are exact in fp32
COLUMNS = 768  # columns of a block of the products, of which only those above the diagonal are computed


class Moments(NamedTuple):
    """Moments of the rows of a matrix ``[n, F]``, all float64 and on one device.

    Attributes:
        rows: number of rows n.
        mean: ``[F]``.
        variance: ``[F]``, variance of each column.
        products: ``[F, F]``, n times the covariance. Of fewer rows than columns, the products ``[n, n]`` of the
            centered rows, which have the same nonzero eigenvalues.
    """

    rows: int
    mean: Tensor
    variance: Tensor
    products: Tensor

    def gram(self) -> Tensor:
        """Sums ``[F, F]`` of the products of two columns, not centered; only for n >= F."""
        return self.products + self.rows * torch.outer(self.mean, self.mean)


def device_of_float64(device: torch.device | None) -> torch.device:
    """Return a CUDA device itself and the CPU for all other devices, which may lack float64."""
    return device if device is not None and device.type == "cuda" else torch.device("cpu")


def feature_moments(rows: Tensor, device: torch.device | None = None) -> Moments:
    """Compute the moments of features.

    Args:
        rows: fp32 ``[n, F]``, n >= 2.
        device: device of the run; see :func:`device_of_float64`.

    Example:
        >>> feature_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).products
        tensor([[2., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    centered = rows.to(device_of_float64(device)).double()
    mean = centered.mean(0)
    centered = centered - mean
    products = centered.T @ centered if rows.shape[0] >= rows.shape[1] else centered @ centered.T
    return Moments(len(rows), mean, centered.square().mean(0), products)


def pixel_moments(rows: Tensor, device: torch.device | None = None) -> Moments:
    """Compute the moments of pixels in [0, 1].

    Products of pixels are summed in fp32, which is exact for blocks of 1,024 rows, since pixels are integers.

    Args:
        rows: uint8 ``[n, F]``, n >= F.
        device: device of the run; see :func:`device_of_float64`.

    Example:
        >>> pixel_moments(torch.tensor([[0], [255]], dtype=torch.uint8)).products
        tensor([[0.5000]], dtype=torch.float64)
    """
    device, width = device_of_float64(device), rows.shape[1]
    total = torch.zeros(width, dtype=torch.float64, device=device)
    products = torch.zeros(width, width, dtype=torch.float64, device=device)
    for part in rows.split(EXACT_ROWS):
        x = part.to(device).float() - 128
        total += x.sum(0)
        for start in range(0, width, COLUMNS):
            columns = slice(start, start + COLUMNS)
            products[columns, start:] += x[:, columns].T @ x[:, start:]
    products = products.triu() + products.triu(1).T
    mean = total / len(rows)
    products = (products - len(rows) * torch.outer(mean, mean)) / 255**2
    return Moments(len(rows), (mean + 128) / 255, products.diagonal().clamp(min=0) / len(rows), products)
