"""Momentum encoder: an exponential moving average (EMA) of a network, used by MoCo and later methods."""

import copy
from collections.abc import Iterator
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

    Attributes:
        stored_outputs: outputs that the next calls return, in place of applying the copy; None to apply it.

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
        self.stored_outputs: Iterator[Tensor] | None = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Apply the copy to ``x``, without gradient."""
        if self.stored_outputs is not None:
            return next(self.stored_outputs)
        return cast(Tensor, self.copy(x))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Update all parameters: ``copy = momentum * copy + (1 - momentum) * original``.

        Args:
            momentum: weight of the copy, in [0, 1].
        """
        averaged: list[tuple[Tensor, Tensor]] = []
        averaged += zip(self.copy.parameters(), self._original[0].parameters(), strict=True)
        copied: list[tuple[Tensor, Tensor]] = []
        if self.statistics != "own":
            for pair in zip(self.copy.buffers(), self._original[0].buffers(), strict=True):
                (averaged if self.statistics == "average" and pair[0].is_floating_point() else copied).append(pair)
        # One kernel for many tensors: on a GPU, launching one per tensor takes longer than the arithmetic.
        if averaged:
            torch._foreach_lerp_([c for c, _ in averaged], [o for _, o in averaged], 1 - momentum)
        if copied:
            torch._foreach_copy_([c for c, _ in copied], [o for _, o in copied])
