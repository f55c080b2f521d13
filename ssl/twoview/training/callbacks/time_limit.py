"""Conversion of a time limit to a number of steps."""

import logging
import math
import time
from typing import Any

import lightning as L

from twoview.schedules import chosen_warmup
from twoview.training.clock import wait_for
from twoview.training.lightning_internals import set_max_steps

log = logging.getLogger(__name__)


class TimeLimit(L.Callback):
    """Converts a time limit to a number of steps, which schedules need.

    The time per step is measured on 50 steps after 10 warm-up steps. The measurement ends early after a fifth of the
    time limit.

    Args:
        seconds: time limit of training in seconds, > 0.
    """

    warm_up, timed = 10, 50

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.steps = self.warm_steps = 0
        self.fixed = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state that checkpoints store."""
        return {"fixed": self.fixed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        self.fixed = state_dict["fixed"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the measurement, or use the number of steps from the checkpoint."""
        self.start = self.warm_at = time.perf_counter()
        self.first = self.steps = trainer.global_step
        self.fixed = self.fixed and pl_module.length_restored
        if self.fixed:
            set_max_steps(trainer, int(pl_module.total_steps))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Set the number of steps when the measurement is complete."""
        now, steps = time.perf_counter(), trainer.global_step
        if self.fixed or steps == self.steps:  # no optimizer step in this batch
            return
        self.steps, done = steps, steps - self.first
        late = trainer.strategy.broadcast(now - self.start > self.seconds / 5)
        if done in (self.warm_up, self.warm_up + self.timed) or late:
            wait_for(pl_module.device)  # which may not have started the last steps yet
            now = time.perf_counter()
        if done <= self.warm_up and not late:
            self.warm_at, self.warm_steps = now, done
        elif late or done == self.warm_up + self.timed:
            per_step = (now - self.warm_at) / (done - self.warm_steps)
            left = max(0.0, self.seconds - (now - self.start))
            # trainer.max_epochs may end the run earlier.
            total = min(steps + max(1, int(left / per_step)), pl_module.total_steps)
            total = trainer.strategy.broadcast(int(total))
            pl_module.total_steps = float(total)
            set_max_steps(trainer, total)
            self.fixed = True
            log.info("trainer.max_time: %.3f s per step, so the run has %d steps", per_step, total)
            epochs = total / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            warmup = chosen_warmup(pl_module.schedule)
            if warmup is not None and warmup > epochs:
                message = "scheduler.warmup_epochs=%g: longer than the run of %.3g epochs that trainer.max_time leaves"
                log.warning(f"{message}; the warm-up is a fifth of the run", warmup, epochs)
