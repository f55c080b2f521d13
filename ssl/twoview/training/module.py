"""The Lightning module around a method: views, loss, optimizer step, learning-rate schedule."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from twoview.augment import TwoViews, derive_seed
from twoview.data import Batch
from twoview.distributed import gather
from twoview.encoder import LAST, ModelCard
from twoview.errors import UserError, require
from twoview.methods import Method, Step
from twoview.negatives import NegativeQueue
from twoview.optim import OptimizerSettings
from twoview.training.lightning_internals import batches_started, is_accumulating
from twoview.training.resume import Conditions

log = logging.getLogger(__name__)


class Pretraining(L.LightningModule):
    """Trains a method on augmented views of images.

    Args:
        method: backbone, head and loss.
        augment: makes the views.
        optimizer: optimizer settings.
        schedule: ``(epoch, epochs) -> factor`` of the learning rate.
        global_batch: images per optimizer step, over all ranks and accumulated batches.
        card: facts that are stored in every checkpoint, see :class:`twoview.encoder.ModelCard`; its seed determines
            augmentation and dropout.
        conditions: settings that are compared when a run is resumed; None for none.
        skip_nonfinite: number of batches that may be skipped because their loss is not finite.
    """

    def __init__(
        self,
        method: Method,
        augment: TwoViews,
        optimizer: OptimizerSettings,
        schedule: Callable[[float, float], float],
        global_batch: int,
        card: ModelCard,
        conditions: Conditions | None = None,
        skip_nonfinite: int = 0,
    ) -> None:
        super().__init__()
        self.method: Method = method.to(memory_format=torch.channels_last)
        self.augment, self.optimizer_settings, self.schedule = augment, optimizer, schedule
        self.global_batch, self.card, self.conditions = global_batch, card, conditions or Conditions()
        self.total_steps: float = math.inf  # known from the start, or once trainer.max_time has been converted to steps
        self.length_restored = False  # whether total_steps came from a checkpoint
        self.on_step_boundary: Callable[[L.Trainer], None] | None = None  # called after all hooks of a batch
        self.skip_nonfinite, self.skipped = skip_nonfinite, 0
        self.batches_without_step = 0
        self.no_update = False  # whether a batch of this optimizer step had no negatives or was skipped
        self.step: Step | None = None

    def configure_optimizers(self) -> Optimizer:
        """The optimizer at the learning rate scaled for the global batch."""
        return self.optimizer_settings.build(self.method, self.global_batch)

    def on_fit_start(self) -> None:
        """Compare the settings of all ranks, and set the length of the run where epochs or steps determine it."""
        mine, rank = (self.card, self.conditions), self.global_rank
        equal = self.trainer.strategy.broadcast(mine) == mine
        require(equal, f"rank {rank} has another configuration, data or software than rank 0; make them equal")
        if (self.trainer.max_epochs != -1 or self.trainer.max_steps != -1) and self.total_steps == math.inf:
            self.total_steps = float(self.trainer.estimated_stepping_batches)

    @property
    def key(self) -> tuple[int, int, int]:
        """Seed, batch counter and rank: the random draws of a batch are a function of these."""
        return self.card.seed, batches_started(self.trainer), self.global_rank

    def views(self, pixels: Tensor) -> list[Tensor]:
        """Views of uint8 ``[N, C, H, W]``, drawn from :attr:`key`, in channels_last memory format."""
        return [view.to(memory_format=torch.channels_last) for view in self.augment(pixels, key=self.key)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Augment, encode, compute the loss."""
        self.no_update = self.no_update or not self.method.ready
        views = self.views(batch.pixels)
        torch.manual_seed(derive_seed((*self.key, 1)))  # dropout is then equal in a resumed run
        # The forward pass changes statistics of BatchNorm, but no queue.
        modules = [m for m in self.method.modules() if self.skip_nonfinite and not isinstance(m, NegativeQueue)]
        state = [(buffer, buffer.clone()) for m in modules for buffer in m.buffers(recurse=False)]
        self.step = self.method(*views, ids=batch.ids, labels=batch.labels)
        loss = self.step.loss
        if self.trainer.strategy.reduce_boolean_decision(bool(loss.detach().isfinite())):
            return loss
        self._not_finite(float(loss.detach()), batch)
        for buffer, before in state:
            buffer.copy_(before)
        self.step, self.no_update = None, True
        # All ranks run a backward pass.
        return 0.0 * torch.stack([p.sum() for p in self.method.parameters() if p.requires_grad]).sum()

    def _not_finite(self, loss: float, batch: Batch) -> None:
        folder, step = Path(self.trainer.default_root_dir), self.global_step
        images = gather(batch.ids).tolist()
        self.skipped += 1
        file = folder / "nonfinite.jsonl"
        if self.global_rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with file.open("a") as lines:
                lines.write(json.dumps({"step": step, "loss": str(loss), "images": images}) + "\n")
        where = f"at step {step} the loss is {loss} (images {', '.join(map(str, images[:4]))}, ...: all in {file})"
        if self.skipped <= self.skip_nonfinite:
            log.warning("%s; the batch is skipped, %d of %d", where, self.skipped, self.skip_nonfinite)
            return
        good, lr = folder / "checkpoints" / LAST, self.trainer.optimizers[0].param_groups[0]["lr"]
        advice = (
            f"lower optimizer.lr (now {lr:g}), set trainer.clip=1, or skip such batches with trainer.skip_nonfinite=N"
        )
        kept = f"the last good checkpoint is {good}" if good.exists() else "no checkpoint had been written"
        raise UserError(f"{where}: training has diverged; {advice}; {kept}")

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Set the learning rate, update the weights, then the state of the method."""
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        factor = self.schedule(self.global_step / steps_per_epoch, self.total_steps / steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        assert optimizer_closure is not None
        loss = optimizer_closure()
        if self.no_update or not self.method.ready:
            # With gradients of zero, weight decay alone would change the weights.
            optimizer.zero_grad()
            self.no_update = False
            self.batches_without_step += 1
            return
        super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        self.method.after_update((self.global_step + 1) / self.total_steps)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Update the state of the method once the loss has been used."""
        if self.step is not None:
            self.method.after_batch(self.step)
        if self.on_step_boundary is not None and not is_accumulating(self.trainer):
            self.on_step_boundary(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the model card and what a resumed run needs, as plain values."""
        counters = {"batches_without_step": self.batches_without_step, "skipped": self.skipped}
        stored = asdict(self.card) | asdict(self.conditions) | counters
        checkpoint["twoview"] = {**stored, "total_steps": self.total_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore counters, and the length of the run unless another one was set."""
        stored = checkpoint["twoview"]
        self.batches_without_step, self.skipped = stored["batches_without_step"], stored["skipped"]
        self.length_restored = stored["length"] == self.conditions.length
        if self.length_restored:
            self.total_steps = stored["total_steps"]
