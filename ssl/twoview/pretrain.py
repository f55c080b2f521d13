"""The Lightning shell around a method: augmentation, optimiser, schedule, precision."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from twoview.augment import TwoViews, mixed
from twoview.backbones import is_depthwise
from twoview.data import Batch
from twoview.distributed import gather
from twoview.errors import UserError
from twoview.methods import Method, Step
from twoview.optim import Optimization

log = logging.getLogger(__name__)


class Pretraining(L.LightningModule):
    """Trains a method on two views of unlabelled images.

    Args:
        method: backbone and head, and how their loss is made.
        augment: makes the two views.
        optimization: the optimiser to be.
        schedule: ``(epoch, epochs) -> factor`` of the learning rate.
        global_batch: images in one optimiser step.
        seed: of image order and augmentation.
        card: plain values that travel in the checkpoint, see :func:`twoview.load`.
        channels_last: memory layout of images and kernels.
        skip_nonfinite: greatest number of batches that are left out because their loss is not finite.
    """

    def __init__(
        self,
        method: Method,
        augment: TwoViews,
        optimization: Optimization,
        schedule: Callable[[float, float], float],
        global_batch: int,
        seed: int = 0,
        card: dict[str, Any] | None = None,
        channels_last: bool = True,
        skip_nonfinite: int = 0,
    ) -> None:
        super().__init__()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.method: Method = method.to(memory_format=layout)
        self.layout = layout
        self.augment, self.optimization, self.schedule = augment, optimization, schedule
        self.global_batch, self.seed, self.card = global_batch, seed, card or {}
        self.total_steps: float = math.inf  # known from the start, or once trainer.max_time has been turned into steps
        self.length_kept = False  # whether it came from the checkpoint of a run that was stopped
        self.at_rest: Callable[[L.Trainer], None] | None = None  # called when a batch has left all its traces
        self.skip_nonfinite, self.skipped = skip_nonfinite, 0
        self.batches_without_step = 0
        self.no_update = False  # whether a batch of this step found no negatives, or was left out
        self.step: Step | None = None

    def configure_optimizers(self) -> Optimizer:
        """The optimiser at the learning rate scaled for the global batch."""
        return self.optimization.build(self.method, self.global_batch)

    def on_fit_start(self) -> None:
        """Learn the length of the run, where epochs or steps give it; all ranks must be doing the same."""
        if self.trainer.strategy.broadcast(self.card) != self.card:
            raise UserError(
                f"rank {self.global_rank} has another configuration, data or software than rank 0; make them equal"
            )
        if (self.trainer.max_epochs != -1 or self.trainer.max_steps != -1) and self.total_steps == math.inf:
            self.total_steps = float(self.trainer.estimated_stepping_batches)

    @property
    def key(self) -> tuple[int, int, int]:
        """What the draws of this batch are a function of: seed, batch counter, rank."""
        return self.seed, self.trainer.fit_loop.epoch_loop.batch_progress.total.ready, self.global_rank

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Both views of uint8 ``[N, C, H, W]``, drawn from (seed, batch counter, rank)."""
        view_a, view_b = self.augment(pixels, key=self.key)
        return view_a.to(memory_format=self.layout), view_b.to(memory_format=self.layout)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Two views, one loss."""
        self.no_update = self.no_update or not self.method.ready
        view_a, view_b = self.views(batch.pixels)
        torch.manual_seed(mixed((*self.key, 1)))  # of dropout, so that a resumed run goes on
        # Statistics of BatchNorm, to go back to; a queue changes between batches only.
        state = [(b, b.clone()) for n, b in self.method.named_buffers() if self.skip_nonfinite and n[:6] != "queue."]
        self.step = self.method(view_a, view_b, batch.ids, batch.labels)
        loss = self.step.loss
        if self.trainer.strategy.reduce_boolean_decision(bool(loss.detach().isfinite())):
            return loss
        self._not_finite(float(loss.detach()), batch)
        for buffer, before in state:
            buffer.copy_(before)
        self.step, self.no_update = None, True
        # For the backward of all ranks.
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
            log.warning("%s; the batch is left out, %d of %d", where, self.skipped, self.skip_nonfinite)
            return
        good = folder / "checkpoints" / "last.ckpt"
        raise UserError(
            f"{where}: training has diverged; lower optimizer.lr (it was {self.optimizers().param_groups[0]['lr']:g}), "  # type: ignore[union-attr]
            "set trainer.clip=1, or leave such batches out with trainer.skip_nonfinite=N; "
            + (f"the last good checkpoint is {good}" if good.exists() else "no checkpoint had been written")
        )

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Learning rate by the schedule, update, then the method's own state."""
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        factor = self.schedule(self.global_step / steps_per_epoch, self.total_steps / steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        assert optimizer_closure is not None
        loss = optimizer_closure()
        if self.no_update or not self.method.ready:
            # A first batch fills the queue. With gradients of zero, weight decay alone would move the weights.
            optimizer.zero_grad()
            self.no_update = False
            self.batches_without_step += 1
            return
        super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        self.method.after_update((self.global_step + 1) / self.total_steps)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Let the method move its state, once the loss has been used."""
        if self.step is not None:
            self.method.after_batch(self.step)
        # Accumulated gradients are in no checkpoint.
        if self.at_rest is not None and not self.trainer.fit_loop._should_accumulate():
            self.at_rest(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Everything that :func:`twoview.load` needs, as plain values."""
        kept = {"total_steps": self.total_steps, "batches_without_step": self.batches_without_step}
        checkpoint["twoview"] = {**self.card, **kept, "skipped": self.skipped}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the length of the run that was fixed before, unless another one was asked for."""
        card = checkpoint["twoview"]
        self.batches_without_step, self.skipped = card["batches_without_step"], card["skipped"]
        self.length_kept = card["length"] == self.card.get("length")
        if self.length_kept:
            self.total_steps = card["total_steps"]


def choose_precision(precision: str, backbone: torch.nn.Module, device: torch.device) -> str:
    """Lightning's name of the precision to train in.

    Args:
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed".
            "auto" is bf16 autocast where the device has it natively and the
            network is not mostly depthwise (slower in bf16 on a CPU), else fp32.
        backbone: the network.
        device: where it will be trained.

    Raises:
        UserError: fp16 on a CPU, where it takes minutes for one batch.
    """
    names = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true"}
    precision = names.get(str(precision), str(precision))
    if precision not in ("auto", *names.values()):
        raise UserError(f"trainer.precision={precision}: choose auto, {', '.join(names.values())}")
    if device.type == "cpu" and precision.startswith("16"):
        raise UserError(f"trainer.precision={precision}: a CPU cannot train in fp16; use auto, bf16-mixed or 32-true")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() and not is_depthwise(backbone)
    return "bf16-mixed" if native else "32-true"
