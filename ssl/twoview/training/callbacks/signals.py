"""Handling of signals that stop a run at the next step boundary, after saving a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch

from twoview.errors import Interrupted, continue_with
from twoview.training.callbacks.save_checkpoints import SaveCheckpoints
from twoview.training.lightning_internals import flush_step_metrics

# Clusters send SIGUSR1 and submitit sends SIGUSR2 before the time limit of a job. Windows lacks some of these signals.
NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")


class SignalHandler(L.Callback):
    """Stores a received signal in a flag that all ranks check at step boundaries.

    A second SIGINT stops the process at once. For SIGUSR1 and SIGUSR2, the handler that was installed before, such as
    that of submitit, is called after saving.

    Args:
        save: callback that saves the checkpoint.

    Attributes:
        every: number of steps between exchanges of the flag by several ranks; each exchange waits for the devices.
    """

    def __init__(self, save: SaveCheckpoints) -> None:
        self.save, self.every = save, 1
        self.received = 0
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers if this is the main thread; Python does not allow handlers in other threads."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is not None:
                self.before[number] = signal.signal(number, self._handle)

    def stop_if_asked(self, trainer: L.Trainer) -> None:
        """Save and stop if any rank has received a signal. Call at a step boundary, after all batch hooks.

        Raises:
            Interrupted: if a rank has received a signal; raised after saving.
        """
        received = self.received
        if trainer.world_size > 1:
            if trainer.global_step % self.every:
                return
            # All ranks use the largest signal number, so that they stop with the same exit code.
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
        saved = f"saved after step {trainer.global_step}; {continue_with(self.save.folder.parent)}"
        code = 130 if received == signal.SIGINT else 143
        raise Interrupted(f"{signal.Signals(received).name}: {saved}", code)

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self.before.items():
            # None: the previous handler was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_train_end(self, *_: Any) -> None:
        """Restore the previous handlers."""
        self.restore()

    def on_exception(self, *_: Any) -> None:
        """Restore the previous handlers."""
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt(f"stopped at once; {continue_with(self.save.folder.parent)}")
        self.received = number
