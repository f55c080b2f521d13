"""MoCo v1, He et al. 2020, arXiv:1911.05722, and MoCo v2, Chen et al. 2020, arXiv:2003.04297."""

from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from twoview.distributed import mean_over_ranks
from twoview.heads import output_width
from twoview.losses import chance_level, info_nce, l2_normalize
from twoview.methods.base import Encoded, Method, Step, check_loss_knobs, check_momentum, check_same, gathered
from twoview.methods.groups import in_groups, in_shuffled_groups
from twoview.methods.temperature import choose_temperature, current, logged
from twoview.metrics import contrastive_logs
from twoview.momentum import MomentumCopy, Statistics
from twoview.negatives import NegativeQueue
from twoview.schedules import cosine_ramp
from twoview.streaming import count_equal
from twoview.variants import LossOptions, Variant

NO_CLASS = 2**32  # added to the index of an image without a class, which identifies it among classes


class MoCo(Method):
    """InfoNCE loss of queries and keys. A momentum encoder computes the keys; a queue of earlier keys is the negatives.

    Args:
        backbone: network, ``[N, C, H, W] -> [N, F]``.
        head: projection head, ``[N, F] -> [N, D]``; one linear layer in v1, two layers in v2.
        temperature: softmax temperature, > 0; 0.07 in v1, 0.2 in v2.
        temperature_end: temperature at the end of the run, reached along half a cosine; None for a constant one.
        learn_temperature: whether the temperature is learned, see :class:`twoview.methods.temperature.Temperature`.
        variant: form of the loss, see :mod:`twoview.losses`.
        same: stored keys that are not negatives of a query, besides those of the same image: "labels" for those of the
            same class, "groups" for those of the same group, or "none".
        group_file: file with the groups of the images, see :func:`twoview.data.read_groups`; required by "groups".
        queue_size: number K of stored keys, >= 1. Stored keys of the same image are not negatives of a query.
        momentum: momentum of the key encoder at the start, in [0, 1).
        momentum_end: momentum at the end of the run, reached along half a cosine; None for a constant momentum.
        symmetric: whether both views serve as queries and as keys; 2N keys are then stored per batch. The loss is the
            mean of both directions. MoCo's CIFAR-10 demonstration takes their sum, which has twice the gradient.
        statistics: source of the running statistics of BatchNorm in the key encoder, see
            :class:`twoview.MomentumCopy`.
        bn: "plain", "split" or "sync", see :class:`Method`; or "shuffle", which is "split" with the keys computed by
            shuffled BatchNorm (v1, section 3.3).
        bn_groups: number G of groups over all ranks, see :class:`Method`.
        **options: ``sigma``, ``tau_plus`` and ``beta`` of the variants, ``mask_above`` and ``products``; see
            :class:`twoview.variants.LossOptions`.

    Raises:
        UserError: if a value is out of range.

    Example:
        >>> from twoview.heads import projection_head
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16))
        >>> method = MoCo(backbone, projection_head(16, out_dim=8), queue_size=12)
        >>> view_a, view_b, ids = torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4), torch.arange(6)
        >>> method.after_batch(method(view_a, view_b, ids=ids))  # the first batch only fills the queue
        >>> step = method(view_a, view_b, ids=ids + 6)
        >>> round(float(step.chance), 4), len(method.queue)
        (1.9459, 6)
    """

    bn_choices = ("plain", "split", "shuffle", "sync")
    in_batch = False

    def __init__(  # noqa: PLR0913
        self,
        backbone: nn.Module,
        head: nn.Module,
        temperature: float = 0.2,
        temperature_end: float | None = None,
        learn_temperature: bool = False,
        variant: Variant = "infonce",
        same: Literal["none", "labels", "groups"] = "none",
        group_file: str | None = None,
        queue_size: int = 65536,
        momentum: float = 0.999,
        momentum_end: float | None = None,
        symmetric: bool = False,
        statistics: Statistics = "own",
        bn: str = "plain",
        bn_groups: int = 2,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        check_loss_knobs(temperature, variant, **options)
        check_momentum(momentum, momentum_end)
        check_same(same, group_file)
        fixed = f"method.variant={variant}" if variant in ("debiased", "hard") else ""
        self.temperature = choose_temperature(temperature, temperature_end, learn_temperature, fixed)
        self.variant, self.same, self.group_file = variant, same, group_file
        self.symmetric, self.options = symmetric, options
        self.momentum, self.momentum_end = momentum, momentum if momentum_end is None else momentum_end
        self.key_encoder = MomentumCopy(nn.Sequential(self.backbone, self.head), statistics)
        self.queue = NegativeQueue(queue_size, output_width(head))

    @property
    def uses_labels(self) -> bool:
        """Whether labels remove stored keys from the negatives."""
        return self.same == "labels"

    @property
    def ready(self) -> bool:
        """Whether the queue holds any keys."""
        return len(self.queue) > 0

    def encode(self, *views: Tensor) -> Encoded:
        """Compute queries of the first view and keys of the second view; if symmetric, also the reverse.

        Args:
            views: two tensors ``[N, C, H, W]``; row i of each is a view of image i.

        Returns:
            Queries as ``embeddings`` and keys as ``targets``; row i of a key is the positive of row i of the query.
        """
        view_a, view_b = views
        features, queries = self.embed(view_a)
        keys: tuple[Tensor, ...] = (self._keys(view_b),)
        if self.symmetric:
            queries += self.embed(view_b)[1]
            keys += (self._keys(view_a),)
        return Encoded(features, queries, targets=keys)

    def loss(self, encoded: Encoded, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Compute the loss of Algorithm 1 of MoCo v1.

        Args:
            encoded: outputs of :meth:`encode` for the N images of this rank.
            ids: int64 ``[N]``, index of each image in the data set; required.
            labels: int64 ``[N]`` classes or groups, -1 for images without one; not used if ``same`` is "none".

        Returns:
            The loss and values for monitoring. ``keys`` are the keys to store in the queue.

        Raises:
            ValueError: if ``ids`` is None.
        """
        if ids is None:
            raise ValueError("MoCo needs the ids of the images, to exclude their own keys from their negatives")
        if self.same != "none" and labels is not None:  # one id for all images of a class
            ids = torch.where(labels >= 0, labels, NO_CLASS + ids)
        queue, queue_ids = self.queue.read()
        temperature = current(self.temperature)
        pairs = list(zip(encoded.embeddings, encoded.targets, strict=True))
        losses = [self._loss(q, k, ids, temperature) for q, k in pairs]
        equal, (q, k) = count_equal(ids, queue_ids), pairs[0]
        valid = ids[:256, None] != queue_ids
        limit = self.options.get("mask_above")
        logs = {
            **contrastive_logs(*_cosines(q[:256].detach(), k[:256], queue), valid, limit),
            **logged(temperature),
            "queue_fill": len(queue) / len(self.queue.keys),
            "queue_age": self.queue.age,
            "queue_masked": equal.float().mean() / len(queue) if len(queue) else 0.0,
        }
        keys = (torch.cat(encoded.targets), ids.repeat(len(pairs)))
        chance = chance_level(len(queue) - equal, self.variant)
        loss = mean_over_ranks(torch.stack(losses).mean())
        return Step(loss, encoded.features, (q.detach(), k), logs, chance, keys)

    def after_update(self, progress: float) -> None:
        """Update temperature and key encoder after an optimizer step; see :meth:`Method.after_update`."""
        super().after_update(progress)
        self.key_encoder.follow(cosine_ramp(progress, self.momentum, self.momentum_end))

    def after_batch(self, step: Step) -> None:
        """Store the keys of all ranks in the queue; see :meth:`Method.after_batch`."""
        if step.keys is not None:
            self.queue.push(*gathered(*step.keys))

    def _loss(self, q: Tensor, k: Tensor, ids: Tensor, temperature: float | Tensor) -> Tensor:
        queue, queue_ids = self.queue.read()
        if self.variant == "dclw" and len(queue):  # the weights of dclw are normalized over the whole batch
            q, k, ids = gathered(q, k, ids)
        return info_nce(q, k, queue, temperature, same=(ids, queue_ids), variant=self.variant, **self.options)

    def _keys(self, view: Tensor) -> Tensor:
        if self.bn == "shuffle":
            return in_shuffled_groups(self.key_encoder, view, self.groups)
        return in_groups(self.key_encoder, (view,), self.groups)[0]


def _cosines(q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        q, k = l2_normalize(q), l2_normalize(k)
        return (q * k).sum(1), q @ queue.to(q.dtype).T
