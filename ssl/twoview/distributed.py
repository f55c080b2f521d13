"""Embeddings of all ranks, with gradient; on one process everything here does nothing."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes; 0 and 1 where none are joined."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def gather(x: Tensor) -> Tensor:
    """``[N, ...]`` of every rank as ``[W * N, ...]``, with gradient: image ``i * W + r`` is image ``i`` of rank r.

    A loss computed from gathered embeddings is the same on every rank. Its gradient reaches the rank that an embedding
    came from once from each of the W losses; the mean over ranks that DistributedDataParallel takes of the parameters'
    gradients then makes it the gradient of the one loss on the joined batch, with no factor to set. (A backward that
    keeps only its own slice would lose the part that flows through the other ranks' negatives.)

    Args:
        x: of the same shape on every rank.
    """
    return x if rank_and_world()[1] == 1 else _Gather.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed)
        return summed[dist.get_rank() :: dist.get_world_size()]
