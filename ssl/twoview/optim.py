"""Optimizers with parameter groups for weight decay and with learning-rate scaling."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from twoview.errors import UserError, require, require_choice
from twoview.schedules import scaled_lr

_FUSED = (AdamW, Adam, SGD)
_IMPLEMENTATIONS = ("fused", "foreach", "differentiable")  # arguments that exclude each other


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer settings.

    Args:
        factory: function ``(parameter_groups, lr=lr) -> Optimizer``, such as
            ``functools.partial(torch.optim.SGD, momentum=0.9)``. AdamW, Adam and SGD of torch are used with
            ``fused=True``, one kernel for many tensors, on a CPU and on CUDA; a factory that sets ``fused``,
            ``foreach`` or ``differentiable`` is used as it is.
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
        decays: dict[str, float] = {"biases and norms": 0.0, "weights": self.weight_decay, "temperature": 0.0}
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": d, "name": name} for name, d in decays.items()]
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                decayed = parameter.ndim > 1 and not name.endswith(".bias")
                groups[2 if name == "temperature.log_scale" else int(decayed)]["params"].append(parameter)
        lr = scaled_lr(self.lr, global_batch, self.lr_scaling)
        try:
            optimizer = self.factory([g for g in groups if g["params"]], lr=lr, **self._fused(groups))
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer.factory: {error}") from error
        for group in optimizer.param_groups:
            group["base_lr"] = lr  # multiplied by the schedule; part of the optimizer state
        return optimizer

    def _fused(self, groups: list[dict[str, Any]]) -> dict[str, bool]:
        """The argument that selects the fused implementation if there is one for the factory and all parameters."""
        own = getattr(self.factory, "keywords", {})
        possible = getattr(self.factory, "func", self.factory) in _FUSED and not any(k in own for k in _IMPLEMENTATIONS)
        parameters = [p for group in groups for p in group["params"]]
        possible = possible and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        return {"fused": True} if possible else {}


def replace_settings(optimizer: Optimizer, given: Optimizer) -> None:
    """Replace all settings of an optimizer, such as the learning rate, and keep its state.

    A checkpoint restores the settings with which it was saved. A checkpoint of any implementation can be continued with
    another one: counters of steps are moved to where the implementation expects them, and moments get the memory layout
    of their parameter, without which fused kernels on a CPU compute wrong values. Autograd gives gradients this layout.

    Args:
        optimizer: an optimizer with restored state.
        given: an optimizer of the same parameter groups with the settings to use.

    Example:
        >>> network = nn.Linear(4, 2)
        >>> restored, given = (OptimizerSettings(lr=lr).build(network, global_batch=256) for lr in (0.1, 0.2))
        >>> replace_settings(restored, given)
        >>> restored.param_groups[0]["lr"]
        0.2
    """
    for group, settings in zip(optimizer.param_groups, given.param_groups, strict=True):
        group.update({name: value for name, value in settings.items() if name != "params"})
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if name == "step" and isinstance(value, Tensor):
                    state[name] = value.to(parameter.device if on_device else "cpu")
                elif isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def clip_gradients(optimizer: Optimizer, limit: float, scaler: torch.amp.GradScaler | None = None) -> None:
    """Scale the gradients so that their norm over all parameters is at most ``limit``.

    Args:
        optimizer: optimizer whose parameters have gradients.
        limit: largest norm of the gradient, > 0.
        scaler: scaler of the loss in fp16. Gradients that a fused optimizer would unscale in its step are unscaled
            here; those of other optimizers must have been unscaled.

    Example:
        >>> network = nn.Linear(4, 2)
        >>> network(torch.ones(1, 4)).sum().backward()
        >>> clip_gradients(OptimizerSettings().build(network, global_batch=256), limit=1.0)
        >>> torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
        tensor(1.0000)
    """
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], limit)


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
