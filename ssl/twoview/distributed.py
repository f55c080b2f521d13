"""All-gather with gradient; a no-op in a single process."""

from typing import Any

import torch
from torch import Tensor, distributed as dist


def rank_and_world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) without a process group.

    Example:
        >>> rank_and_world()
        (0, 1)
    """
    initialized = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)


def gather(x: Tensor) -> Tensor:
    """Concatenate the tensors of all W ranks, with gradient.

    Every rank computes the same loss from the gathered embeddings. The backward pass of this function sums gradients
    over ranks, and DistributedDataParallel averages parameter gradients over ranks. The result is the exact gradient of
    the loss of the joint batch, and no further factor is needed. (A backward pass that returns the local slice without
    the sum would lose the gradient through the negatives of other ranks.)

    Args:
        x: ``[N, ...]``, of the same shape on all ranks.

    Returns:
        ``[N * W, ...]``; row ``i * W + r`` is row i of rank r.

    Example:
        >>> gather(torch.ones(2, 3)).shape  # a single process
        torch.Size([2, 3])
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
