"""MoCo v3, Chen et al. 2021, arXiv:2104.02057: a momentum encoder, a predictor, and negatives from the batch."""

from collections.abc import Callable

from torch import Tensor, nn

from twoview.errors import UserError
from twoview.heads import output_width
from twoview.losses import chance_level, moco_v3_loss
from twoview.methods.base import Method, Step, check_loss_knobs, check_momentum, gathered, in_batch_step
from twoview.methods.groups import in_groups
from twoview.momentum import MomentumCopy, Statistics
from twoview.schedules import cosine_ramp


class MoCoV3(Method):
    """Each view predicts the other's key among the keys of the batch.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``.
        head: ``[N, F] -> [N, D]``.
        predictor: makes the prediction head ``[N, D] -> [N, D]`` for a width D.
        temperature: > 0; 0.2 for transformers and 1.0 for ResNets in the paper.
        momentum: of the key encoder, in [0, 1]; it rises to ``momentum_end`` along a cosine.
        momentum_end: see there.
        freeze_patch_embedding: a transformer's patch projection stays random, which steadies its training (section 4).
        statistics: of the key encoder's BatchNorm, see :class:`twoview.momentum.MomentumCopy`.
        bn: what BatchNorm sees, with ``bn_groups``: see :class:`Method`.
        bn_groups: see there.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        predictor: Callable[[int], nn.Module],
        temperature: float = 0.2,
        momentum: float = 0.99,
        momentum_end: float = 1.0,
        freeze_patch_embedding: bool = False,
        statistics: Statistics = "own",
        bn: str = "plain",
        bn_groups: int = 2,
    ) -> None:
        super().__init__(backbone, head, bn, bn_groups)
        check_loss_knobs(temperature)
        check_momentum(momentum, momentum_end)
        self.temperature, self.momentum, self.momentum_end = temperature, momentum, momentum_end
        self.predictor = self.synced(predictor(output_width(head)))
        self.key_encoder = MomentumCopy(nn.Sequential(self.backbone, self.head), statistics)
        if freeze_patch_embedding:
            if not hasattr(backbone, "patch_embed"):
                raise UserError(
                    "method.freeze_patch_embedding=true: this backbone has no patch embedding; leave it out"
                )
            backbone.patch_embed.requires_grad_(False)

    def forward(self, view_a: Tensor, view_b: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Algorithm 1 of the paper: each view alone, so that BatchNorm sees one view. See :meth:`Method.forward`."""
        features, (z_a,) = self.embed(view_a)
        _, (z_b,) = self.embed(view_b)
        (q_a,), (q_b,) = (in_groups(self.predictor, (z,), self.groups) for z in (z_a, z_b))
        (k_a,), (k_b,) = (in_groups(self.key_encoder, (view,), self.groups) for view in (view_a, view_b))
        q_a, k_b, q_b, k_a = gathered(q_a, k_b, q_b, k_a)
        loss = moco_v3_loss(q_a, k_b, q_b, k_a, self.temperature)
        # Of the loss of ignorance, 2T log N for each of two directions.
        return in_batch_step(loss, features, q_a, k_b, 4 * self.temperature * chance_level(len(q_a) - 1))

    def after_update(self, progress: float) -> None:
        """The key encoder follows."""
        self.key_encoder.follow(cosine_ramp(progress, self.momentum, self.momentum_end))
