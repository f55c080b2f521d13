"""All-gather with gradient; in a single process the functions are no-ops."""

from typing import Any

import torch
from torch import Tensor, distributed as dist


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without a process group.

    Example:
        >>> rank_and_world()
        (0, 1)
    """
    initialized = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)


def gather(x: Tensor) -> Tensor:
    """Concatenate the tensors of all W ranks, with gradient: ``[N, ...]`` to ``[W * N, ...]``.

    Row ``i * W + r`` of the result is row i of rank r.

    The backward pass sums the gradient over ranks. A loss of gathered embeddings is equal on all ranks; with the mean
    over ranks that DistributedDataParallel takes, the gradient of the parameters is that of the loss of the joint
    batch, without a further factor. (A backward pass that only takes its own slice would lose the gradient through the
    negatives of other ranks.)

    Args:
        x: tensor of the same shape on all ranks.

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
