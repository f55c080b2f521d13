"""Collective operations with gradient; no-ops in a single process."""

from typing import Any, cast

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


def own_rows() -> slice:
    """Return the rows of a gathered tensor that belong to this rank, in their order.

    Example:
        >>> gather(torch.arange(3))[own_rows()]
        tensor([0, 1, 2])
    """
    rank, world = rank_and_world()
    return slice(rank, None, world)


def mean_over_ranks(loss: Tensor) -> Tensor:
    """Return the mean of the losses of all ranks, whose gradient is that of the loss of this rank.

    Where each rank computes the mean loss of :func:`own_rows` of gathered embeddings, DistributedDataParallel averages
    these gradients to that of the mean loss.

    Args:
        loss: scalar.

    Example:
        >>> mean_over_ranks(torch.tensor(2.0))
        tensor(2.)
    """
    return loss if rank_and_world()[1] == 1 else cast(Tensor, _Mean.apply(loss))


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


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        total = loss.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
