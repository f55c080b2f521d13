"""SimCLR, Chen et al. 2020, arXiv:2002.05709."""

from torch import Tensor, nn

from twoview.losses import Variant, chance_level, nt_xent
from twoview.methods.base import Method, Step, check_loss_knobs, gathered, in_batch_step


class SimCLR(Method):
    """One encoder sees both views; NT-Xent pulls partners together and pushes all others in the batch apart.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``.
        head: ``[N, F] -> [N, D]``.
        temperature: of NT-Xent, > 0; 0.1 for 4,096 images in the paper, 0.5 for CIFAR-10.
        variant: of the loss, see :func:`twoview.losses.contrast`.
        bn: what BatchNorm sees, with ``bn_groups``: see :class:`Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        temperature: float = 0.5,
        variant: Variant = "infonce",
        bn: str = "plain",
        bn_groups: int = 2,
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        check_loss_knobs(temperature, variant)
        self.temperature = temperature
        self.variant = variant

    def forward(self, view_a: Tensor, view_b: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Algorithm 1 of the paper; see :meth:`Method.forward`."""
        features, views = self.embed(view_a, view_b)  # one pass: BatchNorm sees 2N images
        z_a, z_b = gathered(*views)
        loss = nt_xent(z_a, z_b, self.temperature, variant=self.variant)
        return in_batch_step(loss, features, z_a, z_b, chance_level(2 * len(z_a) - 2, self.variant))
