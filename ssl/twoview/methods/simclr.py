"""SimCLR, Chen et al. 2020, arXiv:2002.05709."""

from typing import Literal, Unpack

from torch import Tensor, nn

from twoview.distributed import mean_over_ranks, own_rows
from twoview.losses import chance_level, nt_xent
from twoview.methods.base import Encoded, Method, Step, check_loss_knobs, check_same, gathered, in_batch_step
from twoview.methods.temperature import choose_temperature, current, logged
from twoview.streaming import count_equal
from twoview.variants import LossOptions, Variant


class SimCLR(Method):
    """NT-Xent loss of the embeddings of two views, with in-batch negatives.

    Args:
        backbone: network, ``[N, C, H, W] -> [N, F]``.
        head: projection head, ``[N, F] -> [N, D]``.
        temperature: softmax temperature, > 0; the paper uses 0.1 for batches of 4,096 images and 0.5 on CIFAR-10.
        temperature_end: temperature at the end of the run, reached along half a cosine; None for a constant one.
        learn_temperature: whether the temperature is learned, see :class:`twoview.methods.temperature.Temperature`.
        variant: form of the loss, see :mod:`twoview.losses`.
        same: images that are not negatives of each other: "labels" for those of one class, "groups" for those of one
            group, or "none" for no others than the views of one image.
        group_file: file with the groups of the images, see :func:`twoview.data.read_groups`; required by "groups".
        bn: images that BatchNorm normalizes together, see :class:`Method`.
        bn_groups: number of BatchNorm groups, see :class:`Method`.
        **options: ``sigma``, ``tau_plus`` and ``beta`` of the variants, ``mask_above`` and ``products``; see
            :class:`twoview.variants.LossOptions`.

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

    def __init__(  # noqa: PLR0913
        self,
        backbone: nn.Module,
        head: nn.Module,
        temperature: float = 0.5,
        temperature_end: float | None = None,
        learn_temperature: bool = False,
        variant: Variant = "infonce",
        same: Literal["none", "labels", "groups"] = "none",
        group_file: str | None = None,
        bn: str = "plain",
        bn_groups: int = 2,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        check_loss_knobs(temperature, variant, **options)
        check_same(same, group_file)
        fixed = f"method.variant={variant}" if variant in ("debiased", "hard") else ""
        self.temperature = choose_temperature(temperature, temperature_end, learn_temperature, fixed)
        self.variant, self.same, self.group_file, self.options = variant, same, group_file, options

    @property
    def uses_labels(self) -> bool:
        """Whether labels remove images from the negatives."""
        return self.same == "labels"

    def loss(self, encoded: Encoded, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Compute the loss of Algorithm 1 of the paper, by :func:`twoview.losses.nt_xent`.

        Args:
            encoded: outputs of :meth:`encode` for the N images of this rank.
            ids: not used.
            labels: int64 ``[N]`` classes or groups, -1 for images without one; not used if ``same`` is "none".

        Returns:
            The loss and values for monitoring.
        """
        z_a, z_b = gathered(*encoded.embeddings)
        same: Tensor | None = None
        chance: Tensor | float = chance_level(2 * len(z_a) - 2, self.variant)
        if self.same != "none" and labels is not None:
            (same,) = gathered(labels)
            chance = chance_level(2 * (len(z_a) - count_equal(same, same).clamp(min=1)), self.variant)
        temperature, rows, limit = current(self.temperature), own_rows(), self.options.get("mask_above")
        loss = nt_xent(z_a, z_b, temperature, variant=self.variant, same=same, anchors=rows, **self.options)
        step = in_batch_step(encoded, mean_over_ranks(loss), z_a, z_b, chance, same, limit)
        step.logs |= logged(temperature)
        if self.variant == "infonce" and same is None and limit is None:
            # Oord et al. 2018, arXiv:1807.03748, eq. 12, in nats; at most the chance level, the logarithm of 2N - 1.
            step.logs["mutual_information_bound"] = chance - step.loss.detach()
        return step
