"""First-in, first-out queue of the keys of earlier batches, which serve as negatives."""

from typing import Any

import torch
from torch import Tensor, nn

from twoview.devices import require_memory
from twoview.errors import UserError, require_at_least
from twoview.losses import l2_normalize


class NegativeQueue(nn.Module):
    """Ring buffer of the last K keys. Keys are module buffers, so that checkpoints contain them.

    MoCo, He et al. 2020, arXiv:1911.05722, section 3.2. The queue starts empty, and only filled slots are returned. The
    image index of each key is stored too, so that keys of the same image can be removed from the negatives of a query.

    No method waits for the device: the number of filled slots and the next slot are also held as Python integers, which
    :meth:`push` and the loading of a state dict keep equal to the buffers. Do not change the buffers in another way.

    Args:
        size: number K of slots, >= 1.
        dim: width D of a key.

    Raises:
        UserError: if the size is below 1, or the keys do not fit in memory.

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
        needed, advice = size * (4 * dim + 16), "choose a smaller one, such as 65536"
        require_memory(f"method.queue_size={size}", needed, advice)
        try:
            self.keys = nn.Buffer(torch.zeros(size, dim))
            self.ids = nn.Buffer(torch.full((size,), -1))
        except (MemoryError, RuntimeError) as error:
            message = f"needs {needed / 1e9:,.1f} GB of memory, which could not be allocated"
            raise UserError(f"method.queue_size={size}: {message}; {advice}") from error
        self.pushed_at = nn.Buffer(torch.zeros(size, dtype=torch.int64))
        self.filled = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.cursor = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.pushes = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self._filled = self._cursor = 0  # values of the buffers; reading a buffer would wait for the device

    def __len__(self) -> int:
        """Number of filled slots."""
        return self._filled

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the content of the k filled slots.

        Returns:
            L2-normalized keys ``[k, D]`` and int64 image indices ``[k]``, in the order of the slots. Both are views of
            the buffers; the next :meth:`push` changes them.
        """
        return self.keys[: self._filled], self.ids[: self._filled]

    @torch.no_grad()
    def push(self, keys: Tensor, ids: Tensor) -> None:
        """Store keys and overwrite the oldest keys. If N > K, only the last K keys are stored.

        In distributed training, push the output of :func:`twoview.distributed.gather`; all ranks then have the same
        queue.

        Args:
            keys: ``[N, D]``; L2-normalized before storing.
            ids: int64 ``[N]``, image index of each key.

        Raises:
            ValueError: if shapes do not match.
        """
        size, dim = self.keys.shape
        if keys.ndim != 2 or keys.shape[1] != dim or ids.shape != keys.shape[:1]:
            raise ValueError(f"push needs keys [N, {dim}] and ids [N], not {list(keys.shape)} and {list(ids.shape)}")
        self.pushes.add_(1)
        first = self._cursor + max(0, len(keys) - size)
        self._cursor = (self._cursor + len(keys)) % size
        keys, ids = keys[-size:], ids[-size:]
        self._filled = min(size, self._filled + len(keys))
        slots = torch.arange(first, first + len(keys), device=self.keys.device) % size
        self.keys[slots] = l2_normalize(keys.to(self.keys.dtype))
        self.ids[slots] = ids.to(self.ids.device)
        self.pushed_at[slots] = self.pushes
        self.cursor.fill_(self._cursor)
        self.filled.fill_(self._filled)

    @property
    def age(self) -> Tensor:
        """Age of the oldest key in batches, an int64 scalar: 1 for a key of the last batch, 0 for an empty queue."""
        if not self._filled:
            return torch.zeros_like(self.pushes)
        oldest = self._cursor if self._filled == len(self.keys) else 0  # slots are filled in their order
        return 1 + self.pushes - self.pushed_at[oldest]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        size = len(self.keys)
        self._filled, self._cursor = min(size, max(0, int(self.filled))), int(self.cursor) % size
