"""A slow copy of a network: the key encoder of MoCo and its successors."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from twoview.errors import UserError

Statistics = Literal["own", "average", "copy"]


class MomentumCopy(nn.Module):
    """A copy of a module whose parameters follow the original's by exponential moving average, without gradient.

    MoCo, He et al. 2020, arXiv:1911.05722, eq. 2. The copy starts equal to the original and can be called like it.

    Args:
        module: the original; it is remembered, not registered, so its parameters appear once.
        statistics: of BatchNorm: "own" is what the copy sees itself (official MoCo), "average" follows as the
            parameters do, "copy" takes the original's.

    Raises:
        UserError: any other ``statistics``.
    """

    def __init__(self, module: nn.Module, statistics: Statistics = "own") -> None:
        super().__init__()
        if statistics not in ("own", "average", "copy"):
            raise UserError(f"method.statistics={statistics}: choose own, average or copy")
        self.copy = copy.deepcopy(module).requires_grad_(False)
        self.statistics = statistics
        self._original = (module,)  # a tuple hides it from nn.Module

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """What the copy makes of ``x``, without gradient."""
        keys: Tensor = self.copy(x)
        return keys

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """``copy = momentum * copy + (1 - momentum) * original``, for all parameters at once.

        Args:
            momentum: in [0, 1].
        """
        mine: list[Tensor] = list(self.copy.parameters())
        its: list[Tensor] = list(self._original[0].parameters())
        torch._foreach_lerp_(mine, its, 1 - momentum)
        if self.statistics == "own":
            return
        for kept, seen in zip(self.copy.buffers(), self._original[0].buffers(), strict=True):
            if self.statistics == "average" and kept.is_floating_point():
                kept.lerp_(seen, 1 - momentum)
            else:
                kept.copy_(seen)
