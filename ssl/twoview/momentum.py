"""Momentum encoder: an exponential moving average of a network, used by MoCo and its successors."""

import copy
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from twoview.errors import require_choice

Statistics = Literal["own", "average", "copy"]


class MomentumCopy(nn.Module):
    """Copy of a module whose parameters are an exponential moving average of the original's, without gradient.

    MoCo, He et al. 2020, arXiv:1911.05722, eq. 2. The copy starts equal to the original.

    Args:
        module: the original. It is not registered as a submodule, so its parameters appear only once.
        statistics: running statistics of BatchNorm: "own", those of the copy's own inputs (official MoCo); "average",
            an exponential moving average like the parameters; "copy", those of the original.

    Raises:
        UserError: an unknown value of ``statistics``.

    Example:
        >>> network = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(network.weight)
        >>> key_encoder = MomentumCopy(network)
        >>> _ = nn.init.zeros_(network.weight)
        >>> key_encoder.follow(momentum=0.75)
        >>> key_encoder(torch.ones(1, 2))
        tensor([[1.5000]])
    """

    def __init__(self, module: nn.Module, statistics: Statistics = "own") -> None:
        super().__init__()
        require_choice("method", get_args(Statistics), statistics=statistics)
        self.copy = copy.deepcopy(module).requires_grad_(False)
        self.statistics = statistics
        self._original = (module,)  # in a tuple, nn.Module does not register it

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Output of the copy for ``x``, without gradient."""
        return cast(Tensor, self.copy(x))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Update all parameters: ``copy = momentum * copy + (1 - momentum) * original``.

        Args:
            momentum: in [0, 1].
        """
        torch._foreach_lerp_(list(self.copy.parameters()), list(self._original[0].parameters()), 1 - momentum)
        if self.statistics == "own":
            return
        for average, original in zip(self.copy.buffers(), self._original[0].buffers(), strict=True):
            if self.statistics == "average" and average.is_floating_point():
                average.lerp_(original, 1 - momentum)
            else:
                average.copy_(original)
