"""Callback that saves checkpoints."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from twoview.errors import require
from twoview.loading import LAST
from twoview.training.checkpoints import BEST


class SaveCheckpoints(L.Callback):
    """Saves ``last.ckpt`` after every check and at the end of the run, and ``best.ckpt`` if the score improves.

    Args:
        folder: folder of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best = float("-inf")

    def state_dict(self) -> dict[str, Any]:
        """Return the state that checkpoints store."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``."""
        self.best = state_dict["best"]

    def save_after_check(self, trainer: L.Trainer, score: float | None) -> None:
        """Save after a check of the features. A larger score is better; None means that there is no score."""
        if score is not None and score > self.best:
            self.best = score
            self.save(trainer, BEST)
        self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final state."""
        self.save(trainer)

    def save(self, trainer: L.Trainer, name: str = LAST) -> None:
        """Save a checkpoint of the current state.

        Raises:
            UserError: if a loss or weights are not finite, or the file cannot be written.
        """
        module: Any = trainer.lightning_module
        module.check_losses()
        finite = torch.stack([weight.isfinite().all() for weight in module.parameters()]).all()
        diverged = f"after step {trainer.global_step} the weights are not finite: training has diverged"
        kept = f"{self.folder / LAST} is unchanged" if (self.folder / LAST).exists() else "no checkpoint was written"
        require(finite, f"{diverged}; lower optimizer.lr or set trainer.clip=1; {kept}")
        trainer.save_checkpoint(self.folder / name)
