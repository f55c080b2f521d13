"""Reuse of freed memory by the C library, which otherwise returns every large tensor to the system."""

from typing import Any

import lightning as L
import torch

from twoview.allocator import DEFAULTS, KEPT, peak_memory, return_memory, set_allocator
from twoview.devices import available_memory


class KeepMemory(L.Callback):
    """Keeps freed memory in the process while a CPU trains.

    glibc returns every freed tensor above 32 MiB to the system, which clears its pages when it hands them out again: a
    sixth of the time of a step of ResNet-18 in bf16. The memory that the process occupies grows by up to half, since
    tensors of different sizes leave gaps. Therefore it is kept only if the machine has twice the memory that the first
    batch took. The setting holds for the whole process until the training ends. No effect without glibc.

    Attributes:
        kept: whether freed memory is kept at the moment.
    """

    def __init__(self) -> None:
        self.kept = False
        self.batches = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Decide after the first batch."""
        self.batches += 1
        if self.batches > 1 or trainer.strategy.root_device.type != "cpu":
            return
        processes = trainer.num_devices  # each of them needs as much
        enough = available_memory(torch.device("cpu")) >= peak_memory() * processes
        self.kept = enough and set_allocator(KEPT)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Return the memory to the system."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Return the memory to the system."""
        self._release()

    def _release(self) -> None:
        if self.kept:
            set_allocator(DEFAULTS)
            return_memory()
        self.kept = False
