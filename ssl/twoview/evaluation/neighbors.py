"""Nearest neighbors on the device of the run, with progress, and features of unit length in blocks."""

import torch
from torch import Tensor

from twoview.devices import available_memory
from twoview.evaluation.progress import track
from twoview.losses import l2_normalize
from twoview.metrics import knn_neighbors

# Each step of the progress display normalizes the bank again, and keeps its results on the device.
FEWEST, MOST = 4096, 65_536  # queries of a step
PRODUCTS = 2**38  # products of two numbers in a step, if it has more than the fewest queries


def neighbors(bank: Tensor, queries: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Find the k nearest neighbors as :func:`twoview.metrics.knn_neighbors` does.

    Args:
        bank: fp32 ``[M, F]``.
        queries: fp32 ``[N, F]``.
        k: number of neighbors.
        device: device of the computation.

    Returns:
        Cosine similarities fp32 ``[N, k]`` and int64 positions ``[N, k]``, on the device of the queries.
    """
    step = min(max(FEWEST, PRODUCTS // max(1, bank.numel())), MOST)
    parts = [knn_neighbors(bank, part, k, device=device) for part in track(queries.split(step))]
    return torch.cat([similarity for similarity, _ in parts]), torch.cat([position for _, position in parts])


class UnitRows:
    """Features scaled to unit length, on the device of the computation.

    All of them are scaled once if they take at most a quarter of the free memory of the device. Otherwise, blocks of
    them are scaled and copied each time they are used.

    Args:
        features: fp32 ``[M, F]``.
        device: device of the computation.
        block: number of rows of a block.
    """

    def __init__(self, features: Tensor, device: torch.device, block: int = 32_768) -> None:
        self.device, self.block = device, block
        self.fits = 4 * features.nbytes < available_memory(device)
        self.features = l2_normalize(features.to(device)) if self.fits else features

    def similarities(self, unit: Tensor) -> Tensor:
        """Return the cosine similarities fp32 ``[n, M]`` of unit-length queries ``[n, F]``, on the device."""
        if self.fits:
            return unit @ self.features.T
        return torch.cat([unit @ l2_normalize(x.to(self.device)).T for x in self.features.split(self.block)], 1)
