"""The queue of negatives: keys of earlier batches, oldest out first."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twoview.errors import UserError


class NegativeQueue(nn.Module):
    """Ring of the last K keys in buffers, so that it lives in checkpoints and moves with the model.

    MoCo, He et al. 2020, arXiv:1911.05722, section 3.2. It starts empty: slots that were never filled are no negatives.
    Each key carries the index of its image, so that a key of the query's own image can be left out of its negatives.

    Args:
        size: K, number of slots.
        dim: D, width of a key.

    Raises:
        UserError: a size below 1.
    """

    keys: Tensor
    ids: Tensor
    pushed_at: Tensor
    filled: Tensor
    cursor: Tensor
    pushes: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"method.queue_size={size}: must be at least 1")
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), -1))
        self.register_buffer("pushed_at", torch.zeros(size, dtype=torch.int64))
        for name in ("filled", "cursor", "pushes"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Filled slots."""
        return int(self.filled)

    def read(self) -> tuple[Tensor, Tensor]:
        """Unit-length keys ``[k, D]`` and int64 image indices ``[k]`` of the k filled slots, in no order that matters.

        They are views of the buffers: the next push changes them.
        """
        filled = len(self)
        return self.keys[:filled], self.ids[:filled]

    @torch.no_grad()
    def push(self, keys: Tensor, ids: Tensor) -> None:
        """Put keys in, over the oldest ones; of more than K keys the last K are kept.

        Under many ranks, push what :func:`twoview.distributed.gather` gives: the queue is then the same on each.

        Args:
            keys: ``[N, D]`` of any length; scaled to length 1.
            ids: int64 ``[N]``, index of each key's image.

        Raises:
            ValueError: shapes that do not fit.
        """
        size, dim = self.keys.shape
        if keys.ndim != 2 or keys.shape[1] != dim or ids.shape != keys.shape[:1]:
            raise ValueError(f"push needs keys [N, {dim}] and ids [N], not {list(keys.shape)} and {list(ids.shape)}")
        self.pushes += 1
        first = int(self.cursor) + max(0, len(keys) - size)
        self.cursor.fill_((int(self.cursor) + len(keys)) % size)
        keys, ids = keys[-size:], ids[-size:]
        slots = torch.arange(first, first + len(keys), device=self.keys.device) % size
        self.keys[slots] = F.normalize(keys.to(self.keys.dtype), dim=1)
        self.ids[slots] = ids.to(self.ids.device)
        self.pushed_at[slots] = self.pushes
        self.filled.fill_(min(size, len(self) + len(keys)))

    @property
    def age(self) -> int:
        """How many batches ago the oldest key came in, seen from the batch that reads it; 0 if there is none."""
        return 1 + int(self.pushes - self.pushed_at[: len(self)].min()) if len(self) else 0
