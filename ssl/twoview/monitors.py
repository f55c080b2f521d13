"""Callbacks that watch a run: what is logged, the progress bar, the check of the features, the time limit."""

import logging
import math
import sys
import time
from typing import Any

import lightning as L
import rich
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from twoview import metrics
from twoview.checkpoints import SaveCheckpoints
from twoview.data import Batch, Images, Preprocess
from twoview.evaluate import extract
from twoview.pretrain import Pretraining

log = logging.getLogger(__name__)


class Watch(L.Callback):
    """Logs how training goes, and warns in plain words when features collapse.

    Args:
        every: steps between two logs; also the Trainer's.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.warned: set[str] = set()
        self.batch_end = self.batch_start = self.logged_at = time.perf_counter()
        self.batches = 0
        self.load = self.augment = self.lap_start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and measure the augmentation from its call to its end."""
        self.batch_end = self.logged_at = time.perf_counter()
        assert isinstance(pl_module, Pretraining)
        self.hooks = [
            pl_module.augment.register_forward_pre_hook(lambda *_: self._lap(pl_module)),
            pl_module.augment.register_forward_hook(lambda *_: self._lap(pl_module, "augment")),
        ]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the clock out of the augmentation."""
        for hook in self.hooks:
            hook.remove()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how long the batch took to come."""
        self.batch_start = time.perf_counter()
        self.load += self.batch_start - self.batch_end

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log every n-th batch."""
        assert isinstance(pl_module, Pretraining)
        self.batches += 1
        if trainer.global_step % self.every == 0 and pl_module.step is not None:
            step = pl_module.step
            z_a, z_b = (z[:1024] for z in step.embeddings)
            now, images = time.perf_counter(), self.batches * len(batch.ids) * trainer.world_size
            seconds = now - self.logged_at
            figures = {
                "loss": float(step.loss.detach()),
                **{name: float(value) for name, value in step.logs.items()},
                "alignment": metrics.alignment(z_a, z_b),
                "uniformity": metrics.uniformity(z_a),
                "effective_rank": metrics.effective_rank(z_a),
                "feature_std": metrics.feature_std(z_a),
                "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
                "images_per_second": images / seconds,
                "time_load": self.load / seconds,
                "time_augment": self.augment / seconds,
                "time_train": 1 - (self.load + self.augment) / seconds,
            }
            pl_module.log_dict({f"train/{name}": value for name, value in figures.items()})
            self._warn(figures)
            self.batches, self.load, self.augment, self.logged_at = 0, 0.0, 0.0, time.perf_counter()
        self.batch_end = time.perf_counter()

    def _lap(self, pl_module: L.LightningModule, add_to: str = "") -> None:
        if pl_module.device.type == "cuda":
            # Work on a GPU is queued: a share of the time needs its end, which costs a wait. One batch in eight tells.
            if self.batches % 8:
                return
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        if add_to:
            self.augment += (now - self.lap_start) * (8 if pl_module.device.type == "cuda" else 1)
        self.lap_start = now

    def _warn(self, figures: dict[str, float]) -> None:
        signs = {
            "std": (
                figures["feature_std"] < 0.1,
                f"all images get nearly the same embedding (feature_std {figures['feature_std']:.3f}, 1 is healthy)",
            ),
            "rank": (
                figures["effective_rank"] < 3,
                f"embeddings vary in about {figures['effective_rank']:.1f} directions only",
            ),
        }
        for name, (collapsed, words) in signs.items():
            if collapsed and name not in self.warned:
                self.warned.add(name)
                log.warning(
                    "The features are collapsing: %s. Try a lower optimizer.lr, another method.temperature, or "
                    "stronger augmentation.",
                    words,
                )


class KnnCheck(L.Callback):
    """Every n epochs: kNN accuracy of held-out training images against the others, clean, from the backbone.

    Args:
        bank: labelled training images that vote.
        held_out: labelled training images that are classified.
        classes: number of classes.
        preprocess: of both.
        every: epochs between checks; 0 for never. The last epoch is always checked otherwise.
        limit: greatest number of images on each side, which bounds the time of a check.
        save: told of every score.
    """

    def __init__(
        self,
        bank: Images,
        held_out: Images,
        classes: int,
        preprocess: Preprocess,
        every: int = 10,
        limit: int = 10_000,
        save: SaveCheckpoints | None = None,
    ) -> None:
        self.bank, self.held_out = (images.subset(torch.arange(min(limit, len(images)))) for images in (bank, held_out))
        self.classes, self.preprocess, self.every, self.save = classes, preprocess, every, save

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check, and log ``val/knn_top1`` and the effective rank of the backbone's features."""
        assert isinstance(pl_module, Pretraining)
        done = trainer.fit_loop.epoch_loop.global_step >= pl_module.total_steps
        if not self.every or not (done or (trainer.current_epoch + 1) % self.every == 0):
            return
        bank, queries = (
            extract(pl_module.method.backbone, split, self.preprocess, pl_module.device)
            for split in (self.bank, self.held_out)
        )
        k = min(20, len(bank))
        predicted = metrics.knn_predict(bank, self.bank.labels, queries, k, 0.1, self.classes)
        figures = {
            "val/knn_top1": float((predicted == self.held_out.labels).float().mean()),
            "val/effective_rank": metrics.effective_rank(bank[: 10 * bank.shape[1]]),
        }
        pl_module.log_dict(figures, sync_dist=trainer.world_size > 1)
        log.info(
            "epoch %d: kNN on held-out training images %.1f %%",
            trainer.current_epoch + 1,
            100 * figures["val/knn_top1"],
        )
        if self.save is not None:
            self.save.checked(trainer, figures["val/knn_top1"])


class TimeLimit(L.Callback):
    """Turns a time into a number of steps, so that every schedule knows the end: measured on 50 steps after 10 others.

    Args:
        seconds: for training, > 0.
    """

    warm, timed = 10, 50

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; the schedule waits."""
        assert isinstance(pl_module, Pretraining)
        self.steps_of_epochs = pl_module.total_steps
        pl_module.total_steps = math.inf
        self.start = self.warm_at = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Fix the number of steps once it can be told."""
        assert isinstance(pl_module, Pretraining)
        if pl_module.total_steps != math.inf:
            return
        now, steps = time.perf_counter(), trainer.global_step
        if steps <= self.warm:
            self.warm_at = now
        # Steps of minutes: do not spend more than a fifth of the time on measuring.
        elif steps == self.warm + self.timed or now - self.start > self.seconds / 5:
            per_step = (now - self.warm_at) / (steps - self.warm)
            left = max(0.0, self.seconds - (now - self.start))
            total = trainer.strategy.broadcast(int(min(steps + max(1, int(left / per_step)), self.steps_of_epochs)))
            pl_module.total_steps = float(total)
            trainer.fit_loop.epoch_loop.max_steps = total
            log.info("trainer.max_time: %.3f s a step, so the run has %d steps", per_step, total)


class Bar(L.Callback):
    """One progress bar for the run, with the loss beside its chance level, images a second and the time left."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar; nothing moves where no person watches."""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=rich.get_console(),
            transient=True,
            disable=not sys.stdout.isatty() or trainer.global_rank != 0,
        )
        self.task = self.progress.add_task("training", total=None, figures="")
        self.progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Move the bar."""
        assert isinstance(pl_module, Pretraining)
        seen = trainer.callback_metrics
        figures = ""
        if "train/loss" in seen:
            figures = (
                f"loss {seen['train/loss']:.3f} (chance {seen['train/chance']:.3f}), "
                f"{seen['train/images_per_second']:,.0f} images/s"
            )
        total = None if pl_module.total_steps == math.inf else pl_module.total_steps
        self.progress.update(self.task, completed=trainer.global_step, total=total, figures=figures)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar away."""
        self.progress.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        if hasattr(self, "progress"):
            self.progress.stop()
