"""Signals that ask a run to stop: the step is finished, the run saved, and the process says where."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch

from twoview.checkpoints import SaveCheckpoints
from twoview.errors import Interrupted

# SIGUSR1 is what clusters send ahead of the end of a job, SIGUSR2 what submitit asks for. Some exist on no Windows.
NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")


class Interrupts(L.Callback):
    """Turns signals into a flag that is looked at after every batch, by all ranks together.

    A second SIGINT stops at once. A handler that was there before, such as submitit's, is called after saving.

    Args:
        save: how the run is saved.
    """

    def __init__(self, save: SaveCheckpoints) -> None:
        self.save = save
        self.received = 0
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen; only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is not None:
                self.before[number] = signal.signal(number, self._handle)

    def stop_if_asked(self, trainer: L.Trainer) -> None:
        """Save and leave, if any rank was asked to; to be called when a batch has left all its traces.

        Raises:
            Interrupted: after saving.
        """
        received = self.received
        if trainer.world_size > 1:
            # The greatest number wins, so that all ranks leave with one code.
            flag = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(flag, reduce_op="max"))
        if not received:
            return
        self.save.last(trainer)
        self.restore()
        # What this step logged, which the loop would write a moment later.
        trainer._logger_connector.on_batch_end()
        trainer._logger_connector.update_train_step_metrics()
        earlier = self.before.get(received)
        if callable(earlier) and received not in (signal.SIGINT, signal.SIGTERM):
            earlier(received, None)
        where = self.save.folder.parent
        raise Interrupted(
            f"{signal.Signals(received).name}: saved after step {trainer.global_step}; go on with resume={where}",
            130 if received == signal.SIGINT else 143,
        )

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            # None stands for a handler that is not Python's.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self.restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
