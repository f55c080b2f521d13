"""Supervised contrastive learning, Khosla et al. 2020, arXiv:2004.11362."""

import torch
from torch import Tensor, nn

from twoview.distributed import mean_over_ranks, own_rows
from twoview.losses import chance_level, sup_con
from twoview.methods.base import Encoded, Method, Step, gathered, in_batch_step
from twoview.methods.temperature import choose_temperature, current, logged


class SupCon(Method):
    """Supervised contrastive loss: all views of the same class are positives of each other.

    Unlabeled images can be included. A view of an unlabeled image has one positive, the other view of the same image.

    Args:
        backbone: network, ``[N, C, H, W] -> [N, F]``.
        head: projection head, ``[N, F] -> [N, D]``.
        temperature: softmax temperature, > 0; 0.1 in the paper.
        temperature_end: temperature at the end of the run, reached along half a cosine; None for a constant one.
        learn_temperature: whether the temperature is learned, see :class:`twoview.methods.temperature.Temperature`.
        bn: images that BatchNorm normalizes together, see :class:`Method`.
        bn_groups: number of BatchNorm groups, see :class:`Method`.

    Raises:
        UserError: if a value is out of range.

    Example:
        >>> from twoview.heads import projection_head
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16))
        >>> method = SupCon(backbone, projection_head(16, out_dim=8))
        >>> labels = torch.tensor([0, 0, 1, 1, -1, -1])
        >>> method(torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4), labels=labels).loss.requires_grad
        True
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        temperature: float = 0.1,
        temperature_end: float | None = None,
        learn_temperature: bool = False,
        bn: str = "plain",
        bn_groups: int = 2,
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        self.temperature = choose_temperature(temperature, temperature_end, learn_temperature)

    @property
    def uses_labels(self) -> bool:
        """Always."""
        return True

    def loss(self, encoded: Encoded, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Compute the loss L_out, eq. 2 of the paper, by :func:`twoview.losses.sup_con`.

        Args:
            encoded: outputs of :meth:`encode` for the N images of this rank.
            ids: not used.
            labels: int64 ``[N]`` classes, -1 for unlabeled images; None if all images are unlabeled.

        Returns:
            The loss and values for monitoring.
        """
        if labels is None:
            labels = torch.full_like(encoded.features[:, 0], -1, dtype=torch.int64)
        z_a, z_b, labels = gathered(*encoded.embeddings, labels)
        temperature = current(self.temperature)
        loss = mean_over_ranks(sup_con(z_a, z_b, labels, temperature, own_rows()))
        step = in_batch_step(encoded, loss, z_a, z_b, chance_level(2 * len(z_a) - 2))
        step.logs |= logged(temperature)
        return step
