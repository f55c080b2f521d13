"""Detection of losses that are not finite, without waiting for the device in every step."""

from typing import NamedTuple

import torch
from torch import Tensor, distributed as dist

from twoview.distributed import rank_and_world


class BatchLoss(NamedTuple):
    """Loss of a batch.

    Attributes:
        step: number of optimizer steps before the batch.
        loss: scalar, without gradient.
        ids: int64 ``[N]``, positions of the images of this rank.
    """

    step: int
    loss: Tensor
    ids: Tensor


class LossCheck:
    """Collects the losses of batches and reads them together, since every reading waits for the device.

    Args:
        every: number of batches after which the losses are :attr:`due`. With 1, each loss is read before the backward
            pass of its batch, so that the batch can be skipped.

    Example:
        >>> check = LossCheck(every=2)
        >>> for step, loss in enumerate([0.5, float("nan")]):
        ...     check.add(BatchLoss(step, torch.tensor(loss), ids=torch.arange(4)))
        >>> check.due, check.first_not_finite().step, check.due
        (True, 1, False)
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.unread: list[BatchLoss] = []

    def add(self, loss: BatchLoss) -> None:
        """Store the loss of a batch; does not wait for the device."""
        self.unread.append(loss)

    @property
    def due(self) -> bool:
        """Whether ``every`` losses have not been read."""
        return len(self.unread) >= self.every

    def first_not_finite(self) -> BatchLoss | None:
        """Read all losses that have not been read; waits for the device, and must be called on all ranks.

        Returns:
            The first batch whose loss is not finite on any rank, with the loss of this rank; None if there is none.
        """
        if not self.unread:
            return None
        unread, self.unread = self.unread, []
        finite = torch.stack([batch.loss for batch in unread]).isfinite().int()
        if rank_and_world()[1] > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        return next((batch for batch, is_finite in zip(unread, finite.tolist(), strict=True) if not is_finite), None)
