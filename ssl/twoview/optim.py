"""Optimizers with parameter groups for weight decay and with learning-rate scaling."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from timm.optim import Lars
from torch import nn
from torch.optim import AdamW, Optimizer

from twoview.errors import UserError, require, require_choice
from twoview.schedules import scaled_lr


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer settings.

    Args:
        factory: function ``(parameter_groups, lr=lr) -> Optimizer``, such as
            ``functools.partial(torch.optim.SGD, momentum=0.9)``.
        lr: learning rate for a batch of 256 images, > 0.
        weight_decay: weight decay of matrices and kernels, >= 0. Biases and parameters of norm layers have no weight
            decay, as in SimCLR and MoCo v3.
        lr_scaling: scaling of ``lr`` with the global batch size: "none", "linear" or "sqrt"; see
            :func:`twoview.schedules.scaled_lr`.

    Raises:
        UserError: if a value is out of range, or LARS is used without weight decay.

    Example:
        >>> optimizer = OptimizerSettings(lr=0.001, lr_scaling="linear").build(nn.Linear(4, 2), global_batch=512)
        >>> type(optimizer).__name__, optimizer.param_groups[0]["lr"]
        ('AdamW', 0.002)
    """

    factory: Callable[..., Optimizer] = partial(AdamW, betas=(0.9, 0.95))  # noqa: RUF009 (immutable)
    lr: float = 4e-3
    weight_decay: float = 1e-2
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr={self.lr}: the learning rate must be above 0")
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay}: must be at least 0")
        require_choice("optimizer", ("none", "linear", "sqrt"), lr_scaling=self.lr_scaling)
        # Lars of timm adapts the learning rate only in groups with weight decay.
        adapts = self.weight_decay > 0 or getattr(self.factory, "func", self.factory) is not Lars
        require(adapts, "optimizer.weight_decay=0: LARS would be plain SGD; set it above 0, such as 1e-6")

    @property
    def name(self) -> str:
        """Name of the optimizer class, such as "AdamW"."""
        return str(getattr(self.factory, "func", self.factory).__name__)

    def build(self, module: nn.Module, global_batch: int) -> Optimizer:
        """Create the optimizer of the parameters that require gradients, with the scaled learning rate.

        Args:
            module: module with the parameters.
            global_batch: number of images per optimizer step, over all ranks and accumulated batches.

        Returns:
            The optimizer. Each parameter group has two additional entries: ``name``, and the scaled learning rate
            ``base_lr``, which the schedule multiplies.

        Raises:
            UserError: if the factory raises a ``TypeError`` or ``ValueError``.
        """
        decays: dict[str, float] = {"biases and norms": 0.0, "weights": self.weight_decay}
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": d, "name": name} for name, d in decays.items()]
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                groups[parameter.ndim > 1 and not name.endswith(".bias")]["params"].append(parameter)
        lr = scaled_lr(self.lr, global_batch, self.lr_scaling)
        try:
            optimizer = self.factory([g for g in groups if g["params"]], lr=lr)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer.factory: {error}") from error
        for group in optimizer.param_groups:
            group["base_lr"] = lr  # multiplied by the schedule; part of the optimizer state
        return optimizer


def describe_groups(optimizer: Optimizer) -> list[str]:
    """Describe each parameter group in one line: tensors, parameters, weight decay, LARS adaptation, learning rate.

    Args:
        optimizer: an optimizer created by :meth:`OptimizerSettings.build`.

    Example:
        >>> describe_groups(OptimizerSettings().build(nn.Linear(4, 2), global_batch=256))[1]
        'AdamW weights: 1 tensors, 8 parameters, weight decay 0.01, learning rate 0.004'
    """
    return [
        f"{type(optimizer).__name__} {g['name']}: {len(g['params'])} tensors, {sum(p.numel() for p in g['params']):,} "
        f"parameters, weight decay {g['weight_decay']:g}, "
        + (f"layer-wise adapted {'yes' if g['weight_decay'] else 'no'}, " if isinstance(optimizer, Lars) else "")
        + f"learning rate {g['base_lr']:g}"
        for g in optimizer.param_groups
    ]
