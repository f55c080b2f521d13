"""Checks of the features during training."""

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor

from twoview import metrics
from twoview.data import Images, fixed_sample
from twoview.encoder import Encoder
from twoview.training.callbacks.save_checkpoints import SaveCheckpoints
from twoview.training.compilation import eager

log = logging.getLogger(__name__)


class FeatureCheck(L.Callback):
    """Logs the effective rank of features and the kNN accuracy on held-out training images, without augmentation.

    Args:
        encoder: encoder with the backbone that is trained.
        images: labeled training images; unlabeled images if there are no labels.
        fit: int64 positions in ``images`` of the kNN bank, which also gives the effective rank.
        held_out: int64 positions in ``images`` of the images that kNN classifies; None for no kNN.
        classes: number of classes.
        save: callback that saves a checkpoint after every check.
        every: number of epochs between checks; 0 for no checks. With checks, the end of the run is also checked.
        limit: largest number of images in ``fit`` and in ``held_out``, which limits the time of a check.
    """

    def __init__(
        self,
        encoder: Encoder,
        images: Images,
        fit: Tensor,
        held_out: Tensor | None,
        classes: int,
        save: SaveCheckpoints,
        every: int = 10,
        limit: int = 10_000,
    ) -> None:
        fit = fit[fixed_sample(len(fit), limit).sort().values]
        held_out = None if held_out is None else held_out[fixed_sample(len(held_out), limit).sort().values]
        self.bank, self.held_out = images.subset(fit), None if held_out is None else images.subset(held_out)
        self.encoder, self.classes, self.save, self.every = encoder, classes, save, every

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log ``val/knn_top1`` and ``val/effective_rank``, and save a checkpoint."""
        done = trainer.global_step >= pl_module.total_steps
        if not self.every or not (done or (trainer.current_epoch + 1) % self.every == 0):
            return
        pl_module.check_losses()
        # On rank 0 only: BatchNorm statistics differ between ranks, but all ranks must choose the same checkpoint.
        found = self.check(pl_module.device) if trainer.is_global_zero else ({}, "")
        figures, message = trainer.strategy.broadcast(found)
        pl_module.log_dict(figures)
        log.info("epoch %d: %s", trainer.current_epoch + 1, message)
        self.save.save_after_check(trainer, figures.get("val/knn_top1"))

    def check(self, device: torch.device | str) -> tuple[dict[str, float], str]:
        """Compute the metrics by name, and a message for the log."""
        self.encoder.to(device)
        with eager(self.encoder.network):
            return self._check()

    def _check(self) -> tuple[dict[str, float], str]:
        bank = self.encoder.feature_matrix(self.bank)
        # Evenly spaced rows, because the images of a folder are sorted by class.
        rows = bank[torch.linspace(0, len(bank) - 1, min(len(bank), 10 * bank.shape[1])).long()]
        # RankMe needs 10 rows per dimension. Fewer rows limit the rank, so the number of rows is logged too.
        figures = {"val/effective_rank": metrics.effective_rank(rows), "val/effective_rank_rows": float(len(rows))}
        message = f"effective rank {figures['val/effective_rank']:.1f} of {bank.shape[1]}"
        if self.held_out is not None:
            queries = self.encoder.feature_matrix(self.held_out)
            predicted = metrics.knn_predict(bank, self.bank.labels, queries, min(20, len(bank)), 0.1, self.classes)
            figures["val/knn_top1"] = float((predicted == self.held_out.labels).float().mean())
            message = f"kNN on held-out training images {100 * figures['val/knn_top1']:.1f} %, {message}"
        return figures, message
