"""Every use of an undocumented attribute of Lightning. Checked with Lightning 2.6.6."""

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger


def batches_started(trainer: L.Trainer) -> int:
    """Batches of this rank since the start of the run, the present one included; restored by a checkpoint.

    ``trainer.global_step`` counts optimizer steps, which are fewer under accumulation.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def batches_completed(trainer: L.Trainer) -> int:
    """Batches of this rank that were completed since the start of the run."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed


def set_max_steps(trainer: L.Trainer, steps: int) -> None:
    """Change the length of a run that is in progress; the Trainer has no setter."""
    trainer.fit_loop.epoch_loop.max_steps = steps


def is_accumulating(trainer: L.Trainer) -> bool:
    """Whether the optimizer step of the present batch is still to come; gradients are not part of a checkpoint."""
    return trainer.fit_loop._should_accumulate()


def flush_step_metrics(trainer: L.Trainer) -> None:
    """Write what the present step has logged, before an exception leaves the loop that would write it."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def keep_csv_rows(loggers: Sequence[Any], step: int) -> None:
    """Let ``metrics.csv`` keep its rows below ``step``: CSVLogger deletes the file of an earlier run."""
    for logger in loggers:
        file = Path(logger.log_dir) / "metrics.csv" if isinstance(logger, CSVLogger) else None
        if file is not None and file.exists():
            with file.open(newline="") as handle:
                rows = [row for row in csv.DictReader(handle) if int(row["step"]) < step]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logger.experiment.metrics = rows
