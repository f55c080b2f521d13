"""MoCo v3, Chen et al. 2021, arXiv:2104.02057."""

from collections.abc import Callable

from torch import Tensor, nn

from twoview.distributed import mean_over_ranks, own_rows
from twoview.errors import require
from twoview.heads import output_width
from twoview.losses import chance_level, moco_v3_loss
from twoview.methods.base import Encoded, Method, Step, check_momentum, gathered, in_batch_step
from twoview.methods.groups import in_groups
from twoview.methods.temperature import choose_temperature, current, logged
from twoview.momentum import MomentumCopy, Statistics
from twoview.schedules import cosine_ramp


class MoCoV3(Method):
    """InfoNCE loss of predictions of one view and keys of the other view, with in-batch negatives.

    A momentum encoder computes the keys.

    Args:
        backbone: network, ``[N, C, H, W] -> [N, F]``.
        head: projection head, ``[N, F] -> [N, D]``.
        predictor: function of D that builds the prediction head, ``[N, D] -> [N, D]``.
        temperature: softmax temperature, > 0; 0.2 for transformers and 1.0 for ResNets in the paper.
        temperature_end: temperature at the end of the run, reached along half a cosine; None for a constant one. The
            temperature cannot be learned, because the loss is multiplied by it.
        momentum: momentum of the key encoder at the start, in [0, 1).
        momentum_end: momentum at the end of the run, in [0, 1], reached along half a cosine.
        freeze_patch_embedding: whether the patch projection of a vision transformer stays at its random initialization,
            which stabilizes training (section 4).
        statistics: source of the running statistics of BatchNorm in the key encoder, see
            :class:`twoview.MomentumCopy`.
        bn: images that BatchNorm normalizes together, see :class:`Method`.
        bn_groups: number of BatchNorm groups, see :class:`Method`.

    Raises:
        UserError: if a value is out of range, or ``freeze_patch_embedding`` is set for a backbone without patches.

    Example:
        >>> import torch
        >>> from twoview.heads import projection_head
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 16))
        >>> method = MoCoV3(backbone, projection_head(16, out_dim=8), predictor=lambda width: nn.Linear(width, width))
        >>> step = method(torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4))
        >>> method.after_update(progress=0.1)
        >>> step.loss.requires_grad, round(step.chance, 4)
        (True, 1.4334)
    """

    def __init__(  # noqa: PLR0913
        self,
        backbone: nn.Module,
        head: nn.Module,
        predictor: Callable[[int], nn.Module],
        temperature: float = 0.2,
        temperature_end: float | None = None,
        momentum: float = 0.99,
        momentum_end: float = 1.0,
        freeze_patch_embedding: bool = False,
        statistics: Statistics = "own",
        bn: str = "plain",
        bn_groups: int = 2,
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        check_momentum(momentum, momentum_end)
        self.temperature = choose_temperature(temperature, temperature_end, learned=False)
        self.momentum, self.momentum_end = momentum, momentum_end
        self.predictor = self.synced(predictor(output_width(head)))
        self.key_encoder = MomentumCopy(nn.Sequential(self.backbone, self.head), statistics)
        if freeze_patch_embedding:
            message = "method.freeze_patch_embedding=true: this backbone has no patch embedding; leave it out"
            require(hasattr(backbone, "patch_embed"), message)
            backbone.patch_embed.requires_grad_(False)

    def encode(self, *views: Tensor) -> Encoded:
        """Encode each view separately, so that BatchNorm normalizes one view at a time (Algorithm 1).

        Args:
            views: two tensors ``[N, C, H, W]``; row i of each is a view of image i.

        Returns:
            Embeddings, predictions and, as ``targets``, keys of each view.
        """
        embedded = [self.embed(view) for view in views]
        embeddings = tuple(z for _, (z,) in embedded)
        predictions = tuple(in_groups(self.predictor, (z,), self.groups)[0] for z in embeddings)
        keys = tuple(in_groups(self.key_encoder, (view,), self.groups)[0] for view in views)
        return Encoded(embedded[0][0], embeddings, predictions, keys)

    def loss(self, encoded: Encoded, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Compute the loss of Algorithm 1 in both directions, by :func:`twoview.losses.moco_v3_loss`.

        Args:
            encoded: outputs of :meth:`encode` for the N images of this rank.
            ids: not used.
            labels: not used.

        Returns:
            The loss and values for monitoring.
        """
        (q_a, q_b), (k_a, k_b) = encoded.predictions, encoded.targets
        q_a, k_b, q_b, k_a = gathered(q_a, k_b, q_b, k_a)
        temperature = current(self.temperature)
        loss = mean_over_ranks(moco_v3_loss(q_a, k_b, q_b, k_a, temperature, own_rows()))
        chance = chance_level(len(q_a) - 1)
        # The chance level of each of the two directions is 2T log N.
        step = in_batch_step(encoded, loss, q_a, k_b, 4 * temperature * chance)
        step.logs |= logged(temperature)
        # Oord et al. 2018, arXiv:1807.03748, eq. 12, in nats, averaged over both directions.
        step.logs["mutual_information_bound"] = chance - loss.detach() / (4 * temperature)
        return step

    def after_update(self, progress: float) -> None:
        """Update temperature and key encoder after an optimizer step; see :meth:`Method.after_update`."""
        super().after_update(progress)
        self.key_encoder.follow(cosine_ramp(progress, self.momentum, self.momentum_end))
