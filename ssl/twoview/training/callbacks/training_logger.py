"""Logging of training metrics, and a warning of collapse."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, distributed as dist

from twoview import metrics
from twoview.data import Batch
from twoview.distributed import gather, rank_and_world
from twoview.methods import Step
from twoview.training.clock import Stopwatch, wait_for

log = logging.getLogger(__name__)


class TrainingLogger(L.Callback):
    """Logs the loss, metrics of the embeddings, and the shares of time spent on loading, augmentation and training.

    Logs one warning if features or embeddings collapse.

    Args:
        every: number of optimizer steps between logged values; the same as ``log_every_n_steps`` of the Trainer.

    Attributes:
        logged: the last logged values by name; empty before the first.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.warned = False
        self.batch_end = self.batch_start = self.logged_at = time.perf_counter()
        self.batches = 0
        self.load = 0.0
        self.logged: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the time measurement, and register hooks that measure the augmentation."""
        self.batch_end = self.logged_at = time.perf_counter()
        self.augment = Stopwatch(pl_module.device)
        self.hooks = [
            pl_module.augment.register_forward_pre_hook(lambda *_: self.augment.start()),
            pl_module.augment.register_forward_hook(lambda *_: self.augment.stop()),
        ]

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Exclude the time between epochs, in which features are checked and checkpoints are saved."""
        now = time.perf_counter()
        self.logged_at += now - self.batch_end
        self.batch_end = now

    def on_train_batch_start(self, *_: Any) -> None:
        """Add the time spent on loading."""
        self.batch_start = time.perf_counter()
        self.load += self.batch_start - self.batch_end

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        """Log the metrics every ``every`` optimizer steps."""
        self.batches += 1
        if trainer.global_step % self.every == 0 and pl_module.step is not None:
            wait_for(pl_module.device)
            now, images = time.perf_counter(), self.batches * len(batch.ids) * trainer.world_size
            seconds = now - self.logged_at
            load, augment = self.load / seconds, self.augment.total() / seconds
            self.logged = {
                **figures(pl_module.step),
                "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
                "images_per_second": images / seconds,
                "time_load": load,
                "time_augment": augment,
                "time_train": max(0.0, 1 - load - augment),  # a GPU augments one batch while another is loaded
            }
            pl_module.log_dict({f"train/{name}": value for name, value in self.logged.items()})
            self._warn(self.logged, trainer.global_step / pl_module.total_steps)
            self.batches, self.load, self.logged_at = 0, 0.0, time.perf_counter()
        self.batch_end = time.perf_counter()

    def _warn(self, figures: dict[str, float], progress: float) -> None:
        # BatchNorm at the end of a head enlarges even tiny differences between embeddings, so backbone features are
        # checked too. These features are nearly equal at random initialization, so the first quarter is excluded.
        alike = figures["embedding_std"] < 0.1 or (progress > 0.25 and figures["feature_std"] < 0.05)
        if alike and not self.warned:
            self.warned = True
            stds = f"standard deviation {figures['feature_std']:.3f}, of embeddings {figures['embedding_std']:.3f}"
            advice = "Try a lower optimizer.lr, another method.temperature, or stronger augmentation."
            log.warning("Collapse: nearly the same features for all images (%s; 1 is evenly spread). %s", stds, advice)


def figures(step: Step) -> dict[str, float]:
    """Compute the figures of a step to log, over the images of all ranks.

    Args:
        step: result of a batch of this rank. Embeddings of other ranks are gathered unless the method has done so.

    Returns:
        Figures by name, equal on all ranks.
    """
    world, own = rank_and_world()[1], len(step.features)
    features, *views = (_rows(z, local=len(z) == own) for z in (step.features, *step.embeddings))
    scalars = {"loss": step.loss, **({} if step.chance is None else {"chance": step.chance}), **step.logs}
    found = {
        **_on_host(scalars, step.loss.device),
        **({"alignment": metrics.alignment(views[0], views[1])} if len(views) > 1 else {}),
        "uniformity": metrics.uniformity(views[0]),
        "embedding_std": metrics.feature_std(views[0]),
        "feature_std": metrics.feature_std(features),
    }
    if world == 1:
        return found
    mean = torch.tensor(list(found.values()), dtype=torch.float64, device=step.loss.device) / world
    dist.all_reduce(mean)
    return dict(zip(found, mean.tolist(), strict=True))


def _on_host(scalars: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Convert scalars to Python numbers, with one transfer for all tensors."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    tensors = {name: value for name, value in scalars.items() if isinstance(value, Tensor)}
    values = torch.stack([tensor.detach().reshape(()).to(device, dtype) for tensor in tensors.values()]).tolist()
    return {name: float(value) for name, value in scalars.items() if name not in tensors} | dict(
        zip(tensors, values, strict=True)
    )


def _rows(z: Tensor, local: bool, limit: int = 1024) -> Tensor:
    """Up to ``limit`` rows of the embeddings of all ranks."""
    world = rank_and_world()[1]
    return gather(z[: limit // world].detach().float()) if local and world > 1 else z[:limit]
