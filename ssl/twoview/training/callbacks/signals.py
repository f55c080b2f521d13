"""Signals that ask a run to stop: finish the step, save, and report where."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch

from twoview.errors import Interrupted
from twoview.training.callbacks.save_checkpoints import SaveCheckpoints
from twoview.training.lightning_internals import flush_step_metrics

# Clusters send SIGUSR1 before the time limit of a job, submitit SIGUSR2. Windows lacks some of them.
NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")


class SignalHandler(L.Callback):
    """Turns signals into a flag that all ranks check together at every step boundary.

    A second SIGINT stops at once. A handler that was installed before, such as submitit's, is called after saving.

    Args:
        save: writes the checkpoint.
    """

    def __init__(self, save: SaveCheckpoints) -> None:
        self.save = save
        self.received = 0
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers; Python allows that in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is not None:
                self.before[number] = signal.signal(number, self._handle)

    def stop_if_asked(self, trainer: L.Trainer) -> None:
        """Save and stop if any rank has received a signal; to be called at a step boundary, after all batch hooks.

        Raises:
            Interrupted: after saving.
        """
        received = self.received
        if trainer.world_size > 1:
            # The largest number is taken, so that all ranks stop with the same exit code.
            flag = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(flag, reduce_op="max"))
        if not received:
            return
        self.save.save(trainer)
        self.restore()
        flush_step_metrics(trainer)
        earlier = self.before.get(received)
        if callable(earlier) and received not in (signal.SIGINT, signal.SIGTERM):
            earlier(received, None)
        saved = f"saved after step {trainer.global_step}; continue with resume={self.save.folder.parent}"
        code = 130 if received == signal.SIGINT else 143
        raise Interrupted(f"{signal.Signals(received).name}: {saved}", code)

    def restore(self) -> None:
        """Install the former handlers again."""
        for number, handler in self.before.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_train_end(self, *_: Any) -> None:
        """Install the former handlers again."""
        self.restore()

    def on_exception(self, *_: Any) -> None:
        """Install the former handlers again."""
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
