"""Progress bar of training."""

import math
import sys
from typing import Any

import lightning as L
import rich
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from twoview.training.callbacks.training_logger import TrainingLogger


class ProgressBar(L.Callback):
    """Progress bar of the run, with loss, chance level, images per second and remaining time.

    Args:
        logger: source of the figures. Those of Lightning are tensors; to read them would wait for the device.
    """

    def __init__(self, logger: TrainingLogger) -> None:
        self.logger = logger

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Show the bar, only on rank 0 and only in a terminal."""
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

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Update the bar."""
        seen, figures = self.logger.logged, ""
        if seen:
            chance = f" (chance {seen['chance']:.3f})" if "chance" in seen else ""
            figures = f"loss {seen['loss']:.3f}{chance}, {seen['images_per_second']:,.0f} images/s"
        total = None if pl_module.total_steps == math.inf else pl_module.total_steps
        self.progress.update(self.task, completed=trainer.global_step, total=total, figures=figures)

    def on_train_end(self, *_: Any) -> None:
        """Remove the bar."""
        self.progress.stop()

    def on_exception(self, *_: Any) -> None:
        """Remove the bar."""
        if hasattr(self, "progress"):
            self.progress.stop()
