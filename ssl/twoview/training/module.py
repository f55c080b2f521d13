"""Lightning module of a method: views, loss, optimizer step and learning-rate schedule."""

import json
import logging
import math
from collections.abc import Callable, Sequence
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
from twoview.encoder import ModelCard
from twoview.errors import UserError, require
from twoview.loading import LAST
from twoview.methods import Method, Step
from twoview.optim import OptimizerSettings, clip_gradients, replace_settings
from twoview.training.finite import BatchLoss, LossCheck
from twoview.training.gradient_caching import copy_buffers, restore_buffers, split_batch, step_in_pieces
from twoview.training.lightning_internals import batches_started, is_accumulating
from twoview.training.resume import Conditions

log = logging.getLogger(__name__)


class Pretraining(L.LightningModule):
    """Trains a method on augmented views of images.

    Args:
        method: backbone, head and loss.
        augment: computes the views.
        optimizer: optimizer settings.
        schedule: factor of the learning rate as a function of completed epochs and number of epochs.
        global_batch: number of images per optimizer step, over all ranks and accumulated batches.
        card: metadata stored in every checkpoint; ``card.seed`` is the seed of augmentation and dropout.
        conditions: settings that are stored and are compared when a run is resumed; None to compare nothing.
        skip_nonfinite: largest number of batches that are skipped because the loss is not finite.
        micro_batch: largest number of images that are encoded together, see :class:`twoview.training.TrainerSettings`.

    Attributes:
        losses: the check of the losses; must read each loss at once if ``skip_nonfinite`` is not 0.
    """

    def __init__(  # noqa: PLR0913
        self,
        method: Method,
        augment: TwoViews,
        optimizer: OptimizerSettings,
        schedule: Callable[[float, float], float],
        global_batch: int,
        card: ModelCard,
        conditions: Conditions | None = None,
        skip_nonfinite: int = 0,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.method: Method = method.to(memory_format=torch.channels_last)
        self.augment, self.optimizer_settings, self.schedule = augment, optimizer, schedule
        self.global_batch, self.card, self.conditions = global_batch, card, conditions or Conditions()
        self.total_steps: float = math.inf  # inf until trainer.max_time is converted to steps
        self.length_restored = False  # whether total_steps came from a checkpoint
        self.on_step_boundary: Callable[[L.Trainer], None] | None = None  # called after all batch hooks
        self.skip_nonfinite, self.skipped = skip_nonfinite, 0
        self.micro_batch = micro_batch
        self.losses = LossCheck()
        self.batches_without_step = 0
        self.changes: list[str] = []  # settings that were changed when the run was resumed
        self.no_update = False  # whether the method was not ready or a batch was skipped in this optimizer step
        self.step: Step | None = None

    def configure_optimizers(self) -> Optimizer:
        """Create the optimizer with the scaled learning rate."""
        return self.optimizer_settings.build(self.method, self.global_batch)

    def on_fit_start(self) -> None:
        """Check that all ranks have equal settings, and set the number of steps if it is known at the start."""
        mine, rank = (self.card, self.conditions), self.global_rank
        equal = self.trainer.strategy.broadcast(mine) == mine
        require(equal, f"rank {rank} has another configuration, data or software than rank 0; make them equal")
        if (self.trainer.max_epochs != -1 or self.trainer.max_steps != -1) and self.total_steps == math.inf:
            self.total_steps = float(self.trainer.estimated_stepping_batches)

    def on_train_start(self) -> None:
        """Replace the learning rate and other settings of the optimizer, which a checkpoint restores, by the given."""
        replace_settings(self.trainer.optimizers[0], self.configure_optimizers())

    @property
    def key(self) -> tuple[int, int, int]:
        """Seed, batch counter and rank, which determine all random draws of a batch."""
        return self.card.seed, batches_started(self.trainer), self.global_rank

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute views, outputs of the networks, and the loss."""
        self.no_update = self.no_update or not self.method.ready
        # Buffers such as BatchNorm statistics are restored if the batch is skipped. Queues do not change before that.
        buffers = copy_buffers(self.method) if self.skip_nonfinite else []
        self.step = self._step(batch)
        self.losses.add(BatchLoss(self.global_step, self.step.loss.detach(), batch.ids))
        if self.losses.every > 1 or self.check_losses():
            return self.step.loss
        restore_buffers(buffers)
        self.step, self.no_update = None, True
        # A zero loss, since all ranks must run a backward pass.
        return 0.0 * torch.stack([p.sum() for p in self.method.parameters() if p.requires_grad]).sum()

    def _step(self, batch: Batch) -> Step:
        """Apply the method to the whole batch, or encode it in pieces."""
        pixels, ids, labels, sizes = batch
        key = (*self.key, 1)  # a resumed run has the same dropout
        pieces = split_batch(len(pixels), self.micro_batch or len(pixels))
        if len(pieces) == 1:
            views = _channels_last(self.augment(pixels, key=self.key, sizes=sizes))
            torch.manual_seed(derive_seed(key))
            step: Step = self.method(*views, ids=ids, labels=labels)
            return step
        draws = self.augment.draw(pixels, self.key, sizes)

        def views_of(part: slice) -> list[Tensor]:
            return _channels_last(self.augment(pixels, draws=draws, part=part))

        context = self.trainer.precision_plugin.forward_context
        return step_in_pieces(self.method, views_of, pieces, key, ids, labels, context)

    def check_losses(self) -> bool:
        """Read the losses that have not been read. Call on all ranks, and before weights are saved.

        Returns:
            True if all are finite; False if the batch of the last one must be skipped.

        Raises:
            UserError: if a loss is not finite and no more batches may be skipped.
        """
        found = self.losses.first_not_finite()
        if found is not None:
            self._not_finite(found)
        return found is None

    def _not_finite(self, found: BatchLoss) -> None:
        folder, step, loss = Path(self.trainer.default_root_dir), found.step, float(found.loss)
        images = gather(found.ids).tolist()
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
        """Set the learning rate, and update the weights and the state of the method."""
        batches = self.trainer.accumulate_grad_batches
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / batches)
        factor = self.schedule(self.global_step / steps_per_epoch, self.total_steps / steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        assert optimizer_closure is not None
        loss = optimizer_closure()
        if self.no_update or not self.method.ready:
            # A step with zero gradients would still apply weight decay.
            optimizer.zero_grad()
            self.no_update = False
            self.batches_without_step += 1
            return
        if (accumulated := batch_idx % batches + 1) < batches:
            # Lightning divides the loss of each batch by ``batches``, but the last step of an epoch has fewer.
            gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, batches / accumulated)
        super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        self.method.after_update((self.global_step + 1) / self.total_steps)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Limit the norm of the gradient. Lightning refuses to do so for fused optimizers in mixed precision."""
        if gradient_clip_val is not None:
            clip_gradients(optimizer, gradient_clip_val, getattr(self.trainer.precision_plugin, "scaler", None))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Update the state of the method after the batch."""
        if self.step is not None:
            self.method.after_batch(self.step)
        if self.losses.due:
            self.check_losses()
        if self.on_step_boundary is not None and not is_accumulating(self.trainer):
            self.on_step_boundary(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the model card, the conditions and the counters as plain values."""
        counters = {"batches_without_step": self.batches_without_step, "skipped": self.skipped}
        stored = asdict(self.card) | asdict(self.conditions) | counters | {"changes": self.changes}
        checkpoint["twoview"] = {**stored, "total_steps": self.total_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters, and the number of steps if the length settings are unchanged."""
        stored = checkpoint["twoview"]
        self.batches_without_step, self.skipped = stored["batches_without_step"], stored["skipped"]
        self.changes = [*stored.get("changes", []), *self.changes]
        self.length_restored = stored["length"] == self.conditions.length
        if self.length_restored:
            self.total_steps = stored["total_steps"]


def _channels_last(views: Sequence[Tensor]) -> list[Tensor]:
    return [view.to(memory_format=torch.channels_last) for view in views]
