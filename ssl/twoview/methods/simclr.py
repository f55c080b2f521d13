"""SimCLR, Chen et al. 2020, arXiv:2002.05709."""

from typing import Literal, Unpack

from torch import Tensor, nn

from twoview.errors import require_choice
from twoview.losses import chance_level, nt_xent, positive_mask
from twoview.methods.base import Encoded, Method, Step, check_loss_knobs, gathered, in_batch_step
from twoview.variants import Variant, VariantParameters


class SimCLR(Method):
    """NT-Xent loss of the embeddings of two views, with in-batch negatives.

    Args:
        backbone: network, ``[N, C, H, W] -> [N, F]``.
        head: projection head, ``[N, F] -> [N, D]``.
        temperature: softmax temperature, > 0; the paper uses 0.1 for batches of 4,096 images and 0.5 on CIFAR-10.
        variant: form of the loss, see :func:`twoview.losses.info_nce_rows`.
        same: "labels" to remove images of the same class from the negatives; "none" to use all images as negatives.
        bn: images that BatchNorm normalizes together, see :class:`Method`.
        bn_groups: number of BatchNorm groups, see :class:`Method`.
        **parameters: parameters ``sigma``, ``tau_plus`` and ``beta`` of the variants, see
            :func:`twoview.losses.info_nce_rows`.

    Raises:
        UserError: if a value is out of range.

    Example:
        >>> from twoview.heads import projection_head
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16))
        >>> method = SimCLR(backbone, projection_head(16, out_dim=8), temperature=0.2)
        >>> step = method(torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4))
        >>> step.loss.shape, step.features.shape, round(step.chance, 4)
        (torch.Size([]), torch.Size([6, 16]), 2.3979)
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        temperature: float = 0.5,
        variant: Variant = "infonce",
        same: Literal["none", "labels"] = "none",
        bn: str = "plain",
        bn_groups: int = 2,
        **parameters: Unpack[VariantParameters],
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        check_loss_knobs(temperature, variant, **parameters)
        require_choice("method", ("none", "labels"), same=same)
        self.temperature, self.variant, self.same = temperature, variant, same
        self.variant_parameters = parameters

    @property
    def uses_labels(self) -> bool:
        """Whether labels remove images from the negatives."""
        return self.same == "labels"

    def loss(self, encoded: Encoded, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Compute the loss of Algorithm 1 of the paper, by :func:`twoview.losses.nt_xent`.

        Args:
            encoded: outputs of :meth:`encode` for the N images of this rank.
            ids: not used.
            labels: int64 ``[N]`` classes, -1 for unlabeled images; used if ``same`` is "labels".

        Returns:
            The loss and values for monitoring.
        """
        z_a, z_b = gathered(*encoded.embeddings)
        same: Tensor | None = None
        chance: Tensor | float = chance_level(2 * len(z_a) - 2, self.variant)
        if self.same == "labels" and labels is not None:
            same = positive_mask(gathered(labels)[0], len(z_a), z_a.device)
            chance = chance_level(2 * (~same).sum(1), self.variant)
        loss = nt_xent(z_a, z_b, self.temperature, variant=self.variant, same=same, **self.variant_parameters)
        return in_batch_step(encoded, loss, z_a, z_b, chance)
