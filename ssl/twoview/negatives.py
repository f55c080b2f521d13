"""Queue of negatives: the keys of earlier batches, first in, first out."""

import torch
from torch import Tensor, nn

from twoview.errors import require_at_least


class NegativeQueue(nn.Module):
    """Ring buffer of the last K keys, stored in buffers so that checkpoints contain it.

    MoCo, He et al. 2020, arXiv:1911.05722, section 3.2. The queue starts empty; unfilled slots are not returned. The
    image index of each key is stored with it, so that keys of a query's own image can be removed from its negatives.

    Args:
        size: number K of slots, >= 1.
        dim: width D of a key.

    Raises:
        UserError: a size below 1.

    Example:
        >>> queue = NegativeQueue(size=4, dim=2)
        >>> queue.push(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), ids=torch.tensor([7, 8]))
        >>> keys, ids = queue.read()
        >>> keys.tolist(), ids.tolist(), len(queue)
        ([[1.0, 0.0], [0.0, 1.0]], [7, 8], 2)
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        require_at_least("method", 1, queue_size=size)
        self.keys = nn.Buffer(torch.zeros(size, dim))
        self.ids = nn.Buffer(torch.full((size,), -1))
        self.pushed_at = nn.Buffer(torch.zeros(size, dtype=torch.int64))
        self.filled = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.cursor = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.pushes = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Number of filled slots."""
        return int(self.filled)

    def read(self) -> tuple[Tensor, Tensor]:
        """Normalized keys ``[k, D]`` and int64 image indices ``[k]`` of the k filled slots, in arbitrary order.

        Both are views of the buffers, which the next :meth:`push` overwrites.
        """
        filled = len(self)
        return self.keys[:filled], self.ids[:filled]

    @torch.no_grad()
    def push(self, keys: Tensor, ids: Tensor) -> None:
        """Store keys in place of the oldest ones; of more than K keys, the last K are stored.

        In distributed training, push the output of :func:`twoview.distributed.gather`, so that all ranks have the same
        queue.

        Args:
            keys: ``[N, D]``; normalized before they are stored.
            ids: int64 ``[N]`` image index of each key.

        Raises:
            ValueError: shapes that do not match.
        """
        size, dim = self.keys.shape
        if keys.ndim != 2 or keys.shape[1] != dim or ids.shape != keys.shape[:1]:
            raise ValueError(f"push needs keys [N, {dim}] and ids [N], not {list(keys.shape)} and {list(ids.shape)}")
        self.pushes.add_(1)
        first = int(self.cursor) + max(0, len(keys) - size)
        self.cursor.fill_((int(self.cursor) + len(keys)) % size)
        keys, ids = keys[-size:], ids[-size:]
        slots = torch.arange(first, first + len(keys), device=self.keys.device) % size
        self.keys[slots] = nn.functional.normalize(keys.to(self.keys.dtype), dim=1)
        self.ids[slots] = ids.to(self.ids.device)
        self.pushed_at[slots] = self.pushes
        self.filled.fill_(min(size, len(self) + len(keys)))

    @property
    def age(self) -> int:
        """Age of the oldest key in batches: 1 if it was stored by the last batch, 0 if the queue is empty."""
        return 1 + int(self.pushes - self.pushed_at[: len(self)].min()) if len(self) else 0
