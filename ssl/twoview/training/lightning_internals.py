"""All uses of undocumented attributes of Lightning and of nn.Module. Checked with Lightning 2.6.6, torch 2.14."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.launchers import subprocess_script
from torch import nn

from twoview.files import read_csv

log = logging.getLogger(__name__)


def batches_started(trainer: L.Trainer) -> int:
    """Return the number of batches that this rank has started, including the current batch; stored in checkpoints.

    ``trainer.global_step`` counts optimizer steps instead, which are fewer if gradients are accumulated.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def batches_completed(trainer: L.Trainer) -> int:
    """Return the number of batches that this rank has completed; stored in checkpoints."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed


def set_max_steps(trainer: L.Trainer, steps: int) -> None:
    """Change the number of steps during a run; the Trainer has no setter."""
    trainer.fit_loop.epoch_loop.max_steps = steps


def is_accumulating(trainer: L.Trainer) -> bool:
    """Return whether gradients are accumulated, so that the current batch does not end an optimizer step."""
    return trainer.fit_loop._should_accumulate()


def skip_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Leave SIGTERM to :class:`twoview.training.callbacks.SignalHandler`.

    Lightning broadcasts in every batch whether rank 0 has received it, which waits for the device.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def swap_compiled_call(network: nn.Module, call: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Replace the function that ``nn.Module.compile`` sets, and return the former one; torch has no way to undo it."""
    former, network._compiled_call_impl = network._compiled_call_impl, call
    return former


def flush_step_metrics(trainer: L.Trainer) -> None:
    """Write the logged values of the current step, before an exception ends the loop that would write them."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def keep_csv_rows(loggers: Sequence[Any], step: int) -> None:
    """Keep the rows of ``metrics.csv`` before ``step`` in a resumed run; CSVLogger alone would delete the file."""
    for logger in loggers:
        file = Path(logger.log_dir) / "metrics.csv" if isinstance(logger, CSVLogger) else None
        if file is not None and file.exists():
            try:
                rows = [row for row in read_csv(file) if row["step"].isdecimal() and int(row["step"]) < step]
            except (OSError, ValueError, KeyError) as error:
                log.warning("%s cannot be read (%s); it begins at step %d", file, error, step)
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logger.experiment.metrics = rows


@contextlib.contextmanager
def process_observer(observe: Callable[[Sequence[Any]], None]) -> Iterator[None]:
    """Let ``observe`` watch the processes that rank 0 starts, in place of Lightning's own observer."""
    launcher: Any = subprocess_script
    original = launcher._launch_process_observer
    launcher._launch_process_observer = observe
    try:
        yield
    finally:
        launcher._launch_process_observer = original
