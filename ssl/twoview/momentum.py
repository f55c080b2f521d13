"""Momentum encoder: an exponential moving average (EMA) of a network, used by MoCo and later methods."""

import copy
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from twoview.errors import require_choice

Statistics = Literal["own", "average", "copy"]


class MomentumCopy(nn.Module):
    """Copy of a module whose parameters are an exponential moving average (EMA) of the original parameters.

    MoCo, He et al. 2020, arXiv:1911.05722, eq. 2. The copy starts equal to the original and has no gradient.

    Args:
        module: the original. It is not registered as a submodule, so its parameters are not listed twice.
        statistics: source of the running statistics of BatchNorm in the copy. "own": inputs of the copy, as in the
            official MoCo code. "average": EMA of the statistics of the original. "copy": statistics of the original.

    Raises:
        UserError: if ``statistics`` is unknown.

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
        self._original = (module,)  # nn.Module does not register modules in a tuple

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Apply the copy to ``x``, without gradient."""
        return cast(Tensor, self.copy(x))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Update all parameters: ``copy = momentum * copy + (1 - momentum) * original``.

        Args:
            momentum: weight of the copy, in [0, 1].
        """
        torch._foreach_lerp_(list(self.copy.parameters()), list(self._original[0].parameters()), 1 - momentum)
        if self.statistics == "own":
            return
        for average, original in zip(self.copy.buffers(), self._original[0].buffers(), strict=True):
            if self.statistics == "average" and average.is_floating_point():
                average.lerp_(original, 1 - momentum)
            else:
                average.copy_(original)
