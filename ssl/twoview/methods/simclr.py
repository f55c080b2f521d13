"""SimCLR, Chen et al. 2020, arXiv:2002.05709."""

from typing import Literal

import torch
from torch import Tensor, nn

from twoview.errors import require
from twoview.losses import Variant, VariantParameters, chance_level, nt_xent, positive_mask
from twoview.methods.base import Encoded, Method, Step, check_loss_knobs, gathered, in_batch_step


class SimCLR(Method):
    """NT-Xent on one encoder: the two views of an image attract, all other views of the batch repel.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``.
        head: ``[N, F] -> [N, D]``.
        temperature: of NT-Xent, > 0; the paper uses 0.1 for batches of 4,096 images and 0.5 on CIFAR-10.
        variant: of the loss, see :func:`twoview.losses.info_nce_rows`.
        sigma: parameter of variant "dclw", > 0.
        tau_plus: parameter of the variants "debiased" and "hard", in [0, 1).
        beta: parameter of variant "hard", >= 0.
        same: "labels" removes images with equal labels from each other's negatives; "none" keeps all.
        bn: see :class:`Method`.
        bn_groups: see :class:`Method`.

    Raises:
        UserError: a value out of range.

    Example:
        >>> from twoview.heads import projection_head
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16))
        >>> method = SimCLR(backbone, projection_head(16, out_dim=8), temperature=0.2)
        >>> step = method(torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4))
        >>> step.loss.shape, step.features.shape, round(step.chance, 4)
        (torch.Size([]), torch.Size([6, 16]), 2.3979)
    """

    def __init__(  # noqa: PLR0913
        self,
        backbone: nn.Module,
        head: nn.Module,
        temperature: float = 0.5,
        variant: Variant = "infonce",
        sigma: float = 0.5,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        same: Literal["none", "labels"] = "none",
        bn: str = "plain",
        bn_groups: int = 2,
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        check_loss_knobs(temperature, variant, sigma, tau_plus, beta)
        require(same in ("none", "labels"), f"method.same={same}: choose none or labels")
        self.temperature, self.variant, self.same = temperature, variant, same
        self.variant_parameters: VariantParameters = {"sigma": sigma, "tau_plus": tau_plus, "beta": beta}

    def encode(self, *views: Tensor) -> Encoded:
        """All views in one pass, so that BatchNorm sees 2N images."""
        return Encoded(*self.embed(*views))

    def loss(self, encoded: Encoded, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Algorithm 1 of the paper."""
        z_a, z_b = gathered(*encoded.embeddings)
        same, negatives = None, torch.tensor(2 * len(z_a) - 2)
        if self.same == "labels" and labels is not None:
            same = positive_mask(gathered(labels)[0], len(z_a), z_a.device)
            negatives = 2 * (~same).sum(1)
        loss = nt_xent(z_a, z_b, self.temperature, variant=self.variant, same=same, **self.variant_parameters)
        return in_batch_step(encoded, loss, z_a, z_b, chance_level(negatives, self.variant))
