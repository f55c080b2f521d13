"""NNCLR, Dwibedi et al. 2021, arXiv:2104.14548: the positive is the nearest neighbour in a support set."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from twoview.heads import output_width
from twoview.losses import batch_nce, chance_level, unit_rows
from twoview.methods.base import Method, Step, check_loss_knobs, gathered, in_batch_step
from twoview.methods.groups import in_groups
from twoview.negatives import NegativeQueue


class NNCLR(Method):
    """The nearest stored neighbour of one view's embedding must pick the prediction from the other view.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``.
        head: ``[N, F] -> [N, D]``.
        predictor: makes the prediction head ``[N, D] -> [N, D]`` for a width D.
        temperature: > 0; 0.1 in the paper.
        queue_size: embeddings in the support set.
        bn: what BatchNorm sees, with ``bn_groups``: see :class:`Method`.
        bn_groups: see there.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        predictor: Callable[[int], nn.Module],
        temperature: float = 0.1,
        queue_size: int = 98304,
        bn: str = "plain",
        bn_groups: int = 2,
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        check_loss_knobs(temperature)
        self.temperature = temperature
        self.predictor = self.synced(predictor(output_width(head)))
        self.queue = NegativeQueue(queue_size, output_width(head))

    def forward(self, view_a: Tensor, view_b: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Eq. 3 of the paper, both ways; see :meth:`Method.forward`."""
        features, views = self.embed(view_a, view_b)
        predictions = in_groups(self.predictor, views, self.groups)
        z_a, z_b, p_a, p_b = gathered(*views, *predictions)
        near_a, near_b = self._nearest(z_a), self._nearest(z_b)
        loss = (batch_nce(near_a, p_b, self.temperature) + batch_nce(near_b, p_a, self.temperature)) / 2
        step = in_batch_step(loss, features, z_a, z_b, chance_level(len(z_a) - 1))
        step.logs["queue_fill"] = len(self.queue) / len(self.queue.keys)
        ids = torch.full((len(view_a),), -1, device=view_a.device) if ids is None else ids
        step.keys = (views[0].detach(), ids)
        return step

    @torch.no_grad()
    def _nearest(self, z: Tensor) -> Tensor:
        stored, _ = self.queue.read()
        if not len(stored):
            return z
        with torch.autocast(z.device.type, enabled=False):  # bf16 cannot tell near neighbours apart
            z = unit_rows(z)
            return stored[(z @ stored.to(z.dtype).T).argmax(1)]
