"""Supervised contrastive learning, Khosla et al. 2020, arXiv:2004.11362."""

import torch
from torch import Tensor, nn

from twoview.losses import chance_level, sup_con
from twoview.methods.base import Method, Step, check_loss_knobs, gathered, in_batch_step


class SupCon(Method):
    """SimCLR in which all views of a class are positives of each other.

    Images without a label count only as their own positive, so that a few labels among many images help.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``.
        head: ``[N, F] -> [N, D]``.
        temperature: > 0; 0.1 in the paper.
        bn: what BatchNorm sees, with ``bn_groups``: see :class:`Method`.
        bn_groups: see there.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, temperature: float = 0.1, bn: str = "plain", bn_groups: int = 2
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        check_loss_knobs(temperature)
        self.temperature = temperature

    def forward(self, view_a: Tensor, view_b: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """L_out of the paper; see :meth:`Method.forward`."""
        features, views = self.embed(view_a, view_b)
        labels = torch.full_like(view_a[:, 0, 0, 0], -1, dtype=torch.int64) if labels is None else labels
        z_a, z_b, labels = gathered(*views, labels)
        loss = sup_con(z_a, z_b, labels, self.temperature)
        return in_batch_step(loss, features, z_a, z_b, chance_level(2 * len(z_a) - 2))
