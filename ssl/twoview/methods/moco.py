"""MoCo, He et al. 2020, arXiv:1911.05722 (v1), and Chen et al. 2020, arXiv:2003.04297 (v2): a queue of negatives."""

import torch
from torch import Tensor, nn

from twoview.heads import output_width
from twoview.losses import Variant, chance_level, info_nce, unit_rows
from twoview.methods.base import Method, Step, check_loss_knobs, check_momentum, gathered
from twoview.methods.groups import in_groups, in_shuffled_groups
from twoview.metrics import contrastive_logs
from twoview.momentum import MomentumCopy, Statistics
from twoview.negatives import NegativeQueue
from twoview.schedules import cosine_ramp


class MoCo(Method):
    """Queries pick their key, made by a slowly moving copy of the encoder, over a queue of earlier keys.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``.
        head: ``[N, F] -> [N, D]``; linear in v1, two layers in v2.
        temperature: of InfoNCE, > 0; 0.07 in v1, 0.2 in v2.
        variant: of the loss, see :func:`twoview.losses.contrast`.
        queue_size: K, keys kept; keys of a query's own image are never its negatives.
        momentum: of the key encoder, in [0, 1].
        momentum_end: what it becomes at the end of the run, along a cosine; None for constant.
        symmetric: both views are queries and keys in turn, and 2N keys are pushed.
        statistics: of the key encoder's BatchNorm, see :class:`twoview.momentum.MomentumCopy`.
        bn: "plain", "split", "sync" (see :class:`Method`), or "shuffle": as "split", but the keys are grouped, over all
            ranks, so that each of their groups holds images of all groups of the queries (section 3.3 of v1).
        bn_groups: G of "split" and "shuffle", over all ranks.
    """

    bn_choices = ("plain", "split", "shuffle", "sync")

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        temperature: float = 0.2,
        variant: Variant = "infonce",
        queue_size: int = 65536,
        momentum: float = 0.999,
        momentum_end: float | None = None,
        symmetric: bool = False,
        statistics: Statistics = "own",
        bn: str = "plain",
        bn_groups: int = 2,
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        check_loss_knobs(temperature, variant)
        check_momentum(momentum, momentum_end)
        self.temperature, self.variant, self.symmetric = temperature, variant, symmetric
        self.momentum, self.momentum_end = momentum, momentum if momentum_end is None else momentum_end
        self.key_encoder = MomentumCopy(nn.Sequential(self.backbone, self.head), statistics)
        self.queue = NegativeQueue(queue_size, output_width(head))

    def forward(self, view_a: Tensor, view_b: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Algorithm 1 of v1; ``ids`` are needed. See :meth:`Method.forward`."""
        if ids is None:
            raise ValueError("MoCo needs the images' ids, to keep their own keys out of their negatives")
        features, (q,) = self.embed(view_a)
        pairs = [(q, self._keys(view_b))]
        if self.symmetric:
            pairs.append((self.embed(view_b)[1][0], self._keys(view_a)))
        queue, queue_ids = self.queue.read()
        same = ids[:, None] == queue_ids
        loss = sum((self._loss(q, k, queue, same) for q, k in pairs), torch.zeros((), device=q.device)) / len(pairs)
        k = pairs[0][1]
        logs = {
            "chance": chance_level((~same).sum(1), self.variant),
            **contrastive_logs(*_cosines(q[:256].detach(), k[:256], queue), ~same[:256]),
            "queue_fill": len(queue) / len(self.queue.keys),
            "queue_age": float(self.queue.age),
            "queue_masked": same.float().mean() if same.numel() else 0.0,
        }
        keys = torch.cat([k for _, k in pairs])
        return Step(loss, features, logs, (q.detach(), k), (keys, ids.repeat(len(pairs))))

    def after_update(self, progress: float) -> None:
        """The key encoder follows."""
        self.key_encoder.follow(cosine_ramp(progress, self.momentum, self.momentum_end))

    def _loss(self, q: Tensor, k: Tensor, queue: Tensor, same: Tensor) -> Tensor:
        if self.variant == "dclw" and len(queue):  # its weights are of the whole batch
            q, k, same = gathered(q, k, same)
        return info_nce(q, k, queue, self.temperature, variant=self.variant, same=same)

    def _keys(self, view: Tensor) -> Tensor:
        if self.bn == "shuffle":
            return in_shuffled_groups(self.key_encoder, view, self.groups)
        return in_groups(self.key_encoder, (view,), self.groups)[0]


def _cosines(q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        q, k = unit_rows(q), unit_rows(k)
        return (q * k).sum(1), q @ queue.to(q.dtype).T
