"""NNCLR, Dwibedi et al. 2021, arXiv:2104.14548."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from twoview.distributed import mean_over_ranks, own_rows
from twoview.heads import output_width
from twoview.losses import batch_nce, chance_level, l2_normalize
from twoview.methods.base import Encoded, Method, Step, gathered, in_batch_step
from twoview.methods.groups import in_groups
from twoview.methods.temperature import choose_temperature, current, logged
from twoview.negatives import NegativeQueue


class NNCLR(Method):
    """InfoNCE loss of nearest neighbors and predictions, with in-batch negatives.

    The embedding of one view is replaced by its nearest neighbor in a support set, a queue of earlier embeddings. The
    positive of this neighbor is the prediction of the other view.

    Args:
        backbone: network, ``[N, C, H, W] -> [N, F]``.
        head: projection head, ``[N, F] -> [N, D]``.
        predictor: function of D that builds the prediction head, ``[N, D] -> [N, D]``.
        temperature: softmax temperature, > 0; 0.1 in the paper.
        temperature_end: temperature at the end of the run, reached along half a cosine; None for a constant one.
        learn_temperature: whether the temperature is learned, see :class:`twoview.methods.temperature.Temperature`.
        queue_size: number of embeddings in the support set, >= 1.
        bn: images that BatchNorm normalizes together, see :class:`Method`.
        bn_groups: number of BatchNorm groups, see :class:`Method`.

    Raises:
        UserError: if a value is out of range.

    Example:
        >>> from twoview.heads import projection_head
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16))
        >>> head = projection_head(16, out_dim=8)
        >>> method = NNCLR(backbone, head, predictor=lambda width: nn.Linear(width, width), queue_size=12)
        >>> method.after_batch(method(torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4)))
        >>> len(method.support_set), round(method(torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4)).chance, 4)
        (6, 1.7918)
    """

    def __init__(  # noqa: PLR0913
        self,
        backbone: nn.Module,
        head: nn.Module,
        predictor: Callable[[int], nn.Module],
        temperature: float = 0.1,
        temperature_end: float | None = None,
        learn_temperature: bool = False,
        queue_size: int = 98304,
        bn: str = "plain",
        bn_groups: int = 2,
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        self.temperature = choose_temperature(temperature, temperature_end, learn_temperature)
        self.predictor = self.synced(predictor(output_width(head)))
        self.support_set = NegativeQueue(queue_size, output_width(head))

    @property
    def ready(self) -> bool:
        """Whether the support set holds any embeddings."""
        return len(self.support_set) > 0

    def encode(self, *views: Tensor) -> Encoded:
        """Apply backbone and head to both views in one pass, and the prediction head to each embedding.

        Args:
            views: two tensors ``[N, C, H, W]``; row i of each is a view of image i.

        Returns:
            Embeddings and predictions of each view.
        """
        features, embeddings = self.embed(*views)
        return Encoded(features, embeddings, tuple(in_groups(self.predictor, embeddings, self.groups)))

    def loss(self, encoded: Encoded, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Compute the loss of eq. 3 of the paper, averaged over both directions.

        Args:
            encoded: outputs of :meth:`encode` for the N images of this rank.
            ids: int64 ``[N]``, index of each image in the data set; None stores -1 for each image.
            labels: not used.

        Returns:
            The loss and values for monitoring. ``keys`` are the embeddings to store in the support set.
        """
        z_a, z_b, p_a, p_b = gathered(*encoded.embeddings, *encoded.predictions)
        temperature, rows = current(self.temperature), own_rows()
        near_a, near_b = z_a.detach().clone(), z_b.detach().clone()
        near_a[rows], near_b[rows] = self._nearest(z_a[rows]), self._nearest(z_b[rows])
        loss = (batch_nce(near_a, p_b, temperature, rows) + batch_nce(near_b, p_a, temperature, rows)) / 2
        step = in_batch_step(encoded, mean_over_ranks(loss), z_a, z_b, chance_level(len(z_a) - 1))
        step.logs |= logged(temperature)
        step.logs["queue_fill"] = len(self.support_set) / len(self.support_set.keys)
        own = encoded.embeddings[0].detach()
        step.keys = (own, torch.full((len(own),), -1, device=own.device) if ids is None else ids)
        return step

    def after_batch(self, step: Step) -> None:
        """Store the embeddings of all ranks in the support set; see :meth:`Method.after_batch`."""
        if step.keys is not None:
            self.support_set.push(*gathered(*step.keys))

    @torch.no_grad()
    def _nearest(self, z: Tensor) -> Tensor:
        stored, _ = self.support_set.read()
        if not len(stored):
            return z
        with torch.autocast(z.device.type, enabled=False):  # bf16 cannot resolve small differences of similarities
            stored_KD = stored.to(l2_normalize(z[:0]).dtype)
            # In parts, so that memory does not grow with the product of batch and support set.
            parts = [(l2_normalize(part) @ stored_KD.T).argmax(1) for part in z.split(256)]
            return stored[torch.cat(parts)]
