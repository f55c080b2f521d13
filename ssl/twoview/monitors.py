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
from torch import Tensor

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
        self.warned = False
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

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the time between epochs out, which checks and checkpoints take."""
        now = time.perf_counter()
        self.logged_at += now - self.batch_end
        self.batch_end = now

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
                "embedding_std": metrics.feature_std(z_a),
                "feature_std": metrics.feature_std(step.features[:1024]),
                "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
                "images_per_second": images / seconds,
                "time_load": self.load / seconds,
                "time_augment": self.augment / seconds,
                "time_train": 1 - (self.load + self.augment) / seconds,
            }
            pl_module.log_dict({f"train/{name}": value for name, value in figures.items()})
            self._warn(figures, trainer.global_step / pl_module.total_steps)
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

    def _warn(self, figures: dict[str, float], progress: float) -> None:
        # A BatchNorm at the end of the head spreads whatever noise is left: the backbone's own features tell. At random
        # initialisation they are nearly alike too, hence the wait.
        alike = figures["embedding_std"] < 0.1 or (progress > 0.25 and figures["feature_std"] < 0.05)
        if alike and not self.warned:
            self.warned = True
            log.warning(
                "The features are collapsing: all images get nearly the same (deviation of features %.3f, of "
                "embeddings %.3f; 1 is spread evenly). Try a lower optimizer.lr, another method.temperature, or "
                "stronger augmentation.",
                figures["feature_std"],
                figures["embedding_std"],
            )


class FeatureCheck(L.Callback):
    """Every n epochs, on clean images: effective rank, and kNN accuracy of held-out training images against the others.

    Args:
        images: labelled training images, or others where there are none.
        fit: positions of those whose features are looked at, and whose labels vote.
        held: positions of those that are classified; None for no kNN.
        classes: number of classes.
        preprocess: of both.
        save: told of every score.
        every: epochs between checks; 0 for never. The last epoch is always checked otherwise.
        limit: greatest number of images on each side, which bounds the time of a check.
    """

    def __init__(
        self,
        images: Images,
        fit: Tensor,
        held: Tensor | None,
        classes: int,
        preprocess: Preprocess,
        save: SaveCheckpoints,
        every: int = 10,
        limit: int = 10_000,
    ) -> None:
        self.bank = images.subset(_sample(fit, limit))
        self.held_out = None if held is None else images.subset(_sample(held, limit))
        self.classes, self.preprocess, self.every, self.save = classes, preprocess, every, save

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check, log ``val/knn_top1`` and ``val/effective_rank``, and save."""
        assert isinstance(pl_module, Pretraining)
        done = trainer.fit_loop.epoch_loop.global_step >= pl_module.total_steps
        if not self.every or not (done or (trainer.current_epoch + 1) % self.every == 0):
            return
        # The first process alone: statistics of BatchNorm differ between ranks, and a choice must not.
        figures, words = trainer.strategy.broadcast(self._check(pl_module) if trainer.is_global_zero else ({}, ""))
        pl_module.log_dict(figures)
        log.info("epoch %d: %s", trainer.current_epoch + 1, words)
        self.save.checked(trainer, figures.get("val/knn_top1"))

    def _check(self, pl_module: Pretraining) -> tuple[dict[str, float], str]:
        bank = extract(pl_module.method.backbone, self.bank, self.preprocess, pl_module.device)
        # From all over the bank: the first pictures of a folder are of one class.
        rows = bank[torch.linspace(0, len(bank) - 1, min(len(bank), 10 * bank.shape[1])).long()]
        # RankMe wants 10 rows a dimension: with fewer, the figure is cut by them, so it is logged how many there were.
        figures = {"val/effective_rank": metrics.effective_rank(rows), "val/effective_rank_rows": float(len(rows))}
        words = f"effective rank {figures['val/effective_rank']:.1f} of {bank.shape[1]}"
        if self.held_out is not None:
            queries = extract(pl_module.method.backbone, self.held_out, self.preprocess, pl_module.device)
            predicted = metrics.knn_predict(bank, self.bank.labels, queries, min(20, len(bank)), 0.1, self.classes)
            figures["val/knn_top1"] = float((predicted == self.held_out.labels).float().mean())
            words = f"kNN on held-out training images {100 * figures['val/knn_top1']:.1f} %, {words}"
        return figures, words


def _sample(positions: Tensor, limit: int) -> Tensor:
    # At random, always the same: the first pictures of a folder are of one class.
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))
    return positions[order[:limit].sort().values]


class TimeLimit(L.Callback):
    """Turns a time into a number of steps, so that every schedule knows the end: measured on 50 steps after 10 others.

    Steps so slow that this would take more than a fifth of the time are measured on fewer.

    Args:
        seconds: for training, > 0.
    """

    warm, timed = 10, 50

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.steps = self.warm_steps = 0
        self.fixed = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {"fixed": self.fixed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.fixed = state_dict["fixed"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, unless the length of the run was fixed before it was stopped."""
        assert isinstance(pl_module, Pretraining)
        self.start = self.warm_at = time.perf_counter()
        self.first = self.steps = trainer.global_step
        self.fixed = self.fixed and pl_module.length_kept
        if self.fixed:
            trainer.fit_loop.epoch_loop.max_steps = int(pl_module.total_steps)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Fix the number of steps once it can be told."""
        assert isinstance(pl_module, Pretraining)
        now, steps = time.perf_counter(), trainer.global_step
        if self.fixed or steps == self.steps:  # no update: a batch of several that are accumulated
            return
        self.steps, done = steps, steps - self.first
        late = trainer.strategy.broadcast(now - self.start > self.seconds / 5)
        if done <= self.warm and not late:
            self.warm_at, self.warm_steps = now, done
        elif late or done == self.warm + self.timed:
            per_step = (now - self.warm_at) / (done - self.warm_steps)
            left = max(0.0, self.seconds - (now - self.start))
            # trainer.max_epochs may end the run before.
            total = int(min(steps + max(1, int(left / per_step)), pl_module.total_steps))
            total = trainer.strategy.broadcast(total)
            pl_module.total_steps = float(total)
            trainer.fit_loop.epoch_loop.max_steps = total
            self.fixed = True
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
