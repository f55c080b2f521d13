"""Optimisers with the parameter groups and the learning-rate scaling that contrastive learning uses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from timm.optim import Lars, param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer

from twoview.errors import UserError
from twoview.schedules import scaled_lr


@dataclass(frozen=True)
class Optimization:
    """An optimiser to be: what to build, and at which learning rate for which batch.

    Args:
        factory: takes parameter groups and ``lr``, such as ``functools.partial(torch.optim.SGD, momentum=0.9)``.
        lr: learning rate at a batch of 256 images, > 0.
        weight_decay: of weight matrices and kernels, >= 0; biases and norm layers have none (as in SimCLR and MoCo v3).
        lr_scaling: "none", "linear" or "sqrt" in the global batch.

    Raises:
        UserError: a value out of range, or LARS without weight decay.
    """

    factory: Callable[..., Optimizer]
    lr: float
    weight_decay: float = 1e-4
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"optimizer.lr={self.lr}: the learning rate must be above 0")
        if not self.weight_decay >= 0:
            raise UserError(f"optimizer.weight_decay={self.weight_decay}: must be at least 0")
        if self.lr_scaling not in ("none", "linear", "sqrt"):
            raise UserError(f"optimizer.lr_scaling={self.lr_scaling}: choose none, linear or sqrt")
        if self.weight_decay == 0 and getattr(self.factory, "func", self.factory) is Lars:
            # timm's Lars adapts only groups with weight decay: biases and norms are left out that way.
            raise UserError("optimizer.weight_decay=0: LARS would silently be plain SGD; set it above 0, such as 1e-6")

    def build(self, module: nn.Module, global_batch: int) -> Optimizer:
        """The optimiser over the parameters of ``module`` that take gradients, at the scaled learning rate.

        Args:
            module: whose parameters are optimised.
            global_batch: images in one optimiser step, over all ranks and accumulated batches.
        """
        groups = param_groups_weight_decay(module, self.weight_decay)
        for group, name in zip(groups, ("biases and norms", "weights"), strict=True):
            group["name"] = name
        lr = scaled_lr(self.lr, global_batch, self.lr_scaling)
        try:
            optimizer = self.factory([g for g in groups if g["params"]], lr=lr)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer.factory: {error}") from error
        for group in optimizer.param_groups:
            group["base_lr"] = lr  # the schedule multiplies this; it travels in the optimiser's state
        return optimizer


def describe_groups(optimizer: Optimizer) -> list[str]:
    """One line a parameter group: tensors, numbers in them, decay, whether LARS adapts it, learning rate."""
    return [
        f"{type(optimizer).__name__} {g['name']}: {len(g['params'])} tensors, {sum(p.numel() for p in g['params']):,} "
        f"numbers, weight decay {g['weight_decay']:g}, "
        + (f"layer-wise adapted {'yes' if g['weight_decay'] else 'no'}, " if isinstance(optimizer, Lars) else "")
        + f"learning rate {g['base_lr']:g}"
        for g in optimizer.param_groups
    ]
