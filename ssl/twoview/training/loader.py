"""Batches for pretraining, and their order."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from twoview.data.image_data import ImageData
from twoview.data.images import WINDOW, Batch, TensorImages
from twoview.training.lightning_internals import batches_started


class BatchOrder(Sampler[Tensor]):
    """Yields the positions of the images of each batch of this rank.

    Positions are a function of seed, epoch and batch, so that a resumed run has the same batches. Every rank gets the
    same number of batches of the same size. The incomplete last global batch of an epoch is dropped. For images stored
    in blocks, the blocks are shuffled, then the images within every 32 blocks, and each rank reads a contiguous part.

    Args:
        size: number of images N.
        batch_size: global batch size, over all ranks, before accumulation.
        seed: seed of the permutations.
        batches_done: function that returns the number of completed batches of the run; called at the start of an epoch.
        rank: rank of this process.
        world_size: number of processes.
        blocks: int64 ``[N]``, index of the block that each image is stored in; None if images are not in blocks.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        batches_done: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
        blocks: Tensor | None = None,
    ) -> None:
        self.size, self.batch_size, self.seed, self.batches_done = size, batch_size, seed, batches_done
        self.rank, self.world_size, self.blocks = rank, world_size, blocks

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        epoch, first = divmod(self.batches_done(), len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=generator)
        if self.blocks is None:
            for i in range(first, len(self)):
                yield order[i * self.batch_size : (i + 1) * self.batch_size][self.rank :: self.world_size]
            return
        # A stable sort keeps the random order within a window of blocks.
        shuffled = torch.randperm(int(self.blocks.max()) + 1, generator=generator)
        order = order[(shuffled[self.blocks[order]] // WINDOW).argsort(stable=True)]
        share = self.batch_size // self.world_size
        own = order[self.rank * len(self) * share : (self.rank + 1) * len(self) * share]
        yield from own.split(share)[first:]


class Prefetcher:
    """Copies the next batch to the device while the current batch trains.

    On CUDA, batches are copied on a stream of their own, for which the kernels of the current batch do not wait.
    Batches that have been copied when a run stops have no effect: :class:`BatchOrder` counts those that were started.

    Args:
        loader: batches in host memory, pinned, or on the device.
        device: device of the training.
    """

    def __init__(self, loader: DataLoader[Batch], device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if stream is not None:  # images that are held on the device must have arrived there
            stream.wait_stream(torch.cuda.current_stream(self.device))
        batches = iter(self.loader)
        batch = self._next(batches, stream)
        while batch is not None:
            if stream is not None:
                training = torch.cuda.current_stream(self.device)
                training.wait_stream(stream)
                for tensor in batch:
                    if isinstance(tensor, Tensor):
                        tensor.record_stream(training)  # its memory is used again only after training has used it
            following = self._next(batches, stream)
            yield batch
            batch = following

    def _next(self, batches: Iterator[Batch], stream: torch.cuda.Stream | None) -> Batch | None:
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            batch = next(batches, None)
            if batch is None:
                return None
            pixels, ids, labels = move_data_to_device(batch[:3], self.device)
            return Batch(pixels, ids, labels, batch.sizes)  # sizes on the host, where the random crops are drawn


class PretrainingData(L.LightningDataModule):
    """Batches of unaugmented uint8 images for pretraining.

    Args:
        images: the images of the run; ``images.pretrain`` and ``images.batch_size`` are used.
        seed: seed of the image order.
    """

    def __init__(self, images: ImageData, seed: int) -> None:
        super().__init__()
        self.images, self.seed = images, seed

    def train_dataloader(self) -> DataLoader[Batch] | Prefetcher:
        """Return the loader of this rank; on CUDA, as a :class:`Prefetcher`.

        Images in host memory are moved to the GPU if they fit into a quarter of the free GPU memory.
        """
        trainer, images = self.trainer, self.images.pretrain
        if trainer is None:
            raise RuntimeError("train_dataloader needs a Trainer")
        device = trainer.strategy.root_device
        on_device = False
        if isinstance(images, TensorImages) and device.type == "cuda":
            on_device = images.pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4
            images.pixels = images.pixels.to(device) if on_device else images.pixels
        pin, workers = device.type == "cuda" and not on_device, images.num_workers
        started, rank, world_size = partial(batches_started, trainer), trainer.global_rank, trainer.world_size
        order = BatchOrder(len(images), self.images.batch_size, self.seed, started, rank, world_size, images.blocks)
        options: Any = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin}
        loader = DataLoader(images, batch_size=None, sampler=order, **options)
        return Prefetcher(loader, device) if device.type == "cuda" else loader
