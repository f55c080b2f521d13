"""Interface of all methods: encode the views of a batch, compute the loss, and update the state of the method."""

from dataclasses import dataclass, field
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from twoview.backbones import sync_batch_norm
from twoview.distributed import gather, rank_and_world
from twoview.errors import UserError, require, require_choice
from twoview.methods.groups import in_groups
from twoview.methods.temperature import Temperature
from twoview.metrics import in_batch_logs
from twoview.variants import LossOptions, check_loss_arguments


class Encoded(NamedTuple):
    """Outputs of the networks for the V views of N images; row i of each tensor belongs to image i.

    Attributes:
        features: ``[N, F]`` backbone features of the first view, without gradient.
        embeddings: one tensor ``[N, D]`` per view, outputs of the projection head, with gradient.
        predictions: one tensor ``[N, D]`` per view, outputs of the prediction head, with gradient; empty without one.
        targets: one tensor ``[N, D]`` per view, outputs of the momentum encoder, without gradient; empty without one.
    """

    features: Tensor
    embeddings: tuple[Tensor, ...]
    predictions: tuple[Tensor, ...] = ()
    targets: tuple[Tensor, ...] = ()


@dataclass
class Step:
    """Result of one batch.

    Attributes:
        loss: scalar, at least fp32, with gradient.
        features: ``[N, F]`` backbone features of the first view, without gradient.
        embeddings: one tensor ``[N, D]`` per view, without gradient, for monitoring. Row i of the first two tensors is
            a positive pair.
        logs: further scalars to log, by name. Tensors are read at logged steps only.
        chance: loss if all similarities are equal, see :func:`twoview.losses.chance_level`; None if not defined.
        keys: keys ``[M, D]`` and int64 image indices ``[M]`` that :meth:`Method.after_batch` stores; None for no keys.
    """

    loss: Tensor
    features: Tensor
    embeddings: tuple[Tensor, ...]
    logs: dict[str, Tensor | float] = field(default_factory=dict)
    chance: Tensor | float | None = None
    keys: tuple[Tensor, Tensor] | None = None


class Method(nn.Module):
    """Base class of methods, with a backbone, a projection head and a loss.

    Subclasses implement :meth:`loss`. Subclasses with further networks also override :meth:`encode`. The state of a
    method, such as a momentum encoder or a queue, is updated only in :meth:`after_update` (once per optimizer step) and
    :meth:`after_batch` (once per batch). Losses are computed from the embeddings of all ranks.

    No method waits for the device, which would leave it idle while the next kernels are launched: values that depend on
    tensors, such as ``chance`` and ``logs`` of a :class:`Step`, stay tensors. See docs/adding_a_method.md.

    Args:
        backbone: network, ``[N, C, H, W] -> [N, F]``.
        head: projection head, ``[N, F] -> [N, D]``.
        bn: images that BatchNorm normalizes together; batch statistics can reveal which images are positives.

            * "plain": all images of a rank.
            * "split": each of G groups of images separately, as on G devices; image i belongs to group i mod G.
            * "sync": the images of all ranks (CUDA only).

            :class:`twoview.methods.MoCo` also has "shuffle".
        bn_groups: number G of groups over all ranks, for "split" and "shuffle", >= 2. If G is larger than the number of
            ranks, G must be a multiple of that number.

    Attributes:
        bn_choices: allowed values of ``bn``.
        in_batch: whether the loss of an image depends on the other images of the batch, as with in-batch negatives.
            False if accumulated batches have the same gradient as one large batch.

    Raises:
        UserError: if ``bn`` is unknown or not available, or ``bn_groups`` is below 2.
    """

    bn_choices: tuple[str, ...] = ("plain", "split", "sync")
    in_batch: bool = True

    def __init__(self, backbone: nn.Module, head: nn.Module, bn: str = "plain", bn_groups: int = 2) -> None:
        super().__init__()
        require_choice("method", self.bn_choices, bn=bn)
        message = "must be at least 2; for one group choose method.bn=plain"
        require(bn_groups >= 2, f"method.bn_groups={bn_groups}: {message}")
        require(bn != "sync" or torch.cuda.is_available(), "method.bn=sync: needs a GPU; choose plain or split")
        self.bn, self.bn_groups = bn, bn_groups
        self.backbone = self.synced(backbone)
        self.head = self.synced(head)

    @property
    def uses_labels(self) -> bool:
        """Whether the loss depends on labels."""
        return False

    @property
    def ready(self) -> bool:
        """Whether the next batch may update the weights; False while a queue of the method is empty."""
        return True

    def synced(self, module: nn.Module) -> nn.Module:
        """Return the module, with BatchNorm converted to SyncBatchNorm if ``bn`` is "sync"."""
        return sync_batch_norm(module) if self.bn == "sync" else module

    @property
    def groups(self) -> int:
        """Number of BatchNorm groups on this rank; 1 if BatchNorm is not computed in groups."""
        world = rank_and_world()[1]
        if self.bn not in ("split", "shuffle") or self.bn_groups <= world:
            return 1
        divisible = self.bn_groups % world == 0
        require(divisible, f"method.bn_groups={self.bn_groups}: cannot be divided among {world} processes")
        return self.bn_groups // world

    def embed(self, *views: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Apply backbone and head to all views in one pass.

        Args:
            views: V tensors ``[N, C, H, W]``; row i of each is a view of image i.

        Returns:
            Features ``[N, F]`` of the first view, without gradient, and embeddings ``[N, D]`` of each view.

        Raises:
            UserError: if the images cannot be divided into the BatchNorm groups.
        """
        features = in_groups(self.backbone, views, self.groups)
        return features[0].detach(), tuple(in_groups(self.head, features, self.groups))

    def encode(self, *views: Tensor) -> Encoded:
        """Apply backbone and head to all views in one pass. May be called on parts of a batch.

        Args:
            views: V tensors ``[N, C, H, W]``; row i of each is a view of image i.

        Returns:
            Outputs of the networks.
        """
        return Encoded(*self.embed(*views))

    def loss(self, encoded: Encoded, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Compute the loss of a whole batch from the outputs of the networks.

        Args:
            encoded: outputs of :meth:`encode` for all N images of this rank.
            ids: int64 ``[N]``, index of each image in the data set; None if the method does not need indices.
            labels: int64 ``[N]`` classes, -1 for unlabeled images; None for no labels.

        Returns:
            The loss, and values for monitoring and for the update of the state.
        """
        raise NotImplementedError

    def forward(self, *views: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Apply :meth:`encode`, then :meth:`loss`.

        Args:
            views: V tensors ``[N, C, H, W]``; row i of each is a view of image i.
            ids: int64 ``[N]``, index of each image in the data set.
            labels: int64 ``[N]`` classes, -1 for unlabeled images.

        Returns:
            The result of :meth:`loss`.
        """
        return self.loss(self.encode(*views), ids, labels)

    def after_update(self, progress: float) -> None:
        """Update the state after an optimizer step: by default, the temperatures of the loss.

        Args:
            progress: completed share of the run, in [0, 1].
        """
        for module in self.children():
            if isinstance(module, Temperature):
                module.move(progress)

    def after_batch(self, step: Step) -> None:
        """Update the state after a batch; if the batch ends an optimizer step, after that step.

        Args:
            step: result of :meth:`loss` for the batch.
        """


def in_batch_step(
    encoded: Encoded,
    loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    chance: Tensor | float,
    same: Tensor | None = None,
    above: float | None = None,
) -> Step:
    """Build the step of a method whose negatives are the other images of the batch.

    Args:
        encoded: outputs of the networks.
        loss: scalar loss.
        z_a: ``[N, D]`` embeddings of the first views, gathered from all ranks.
        z_b: ``[N, D]`` embeddings of the second views; row i is the positive of row i of ``z_a``.
        chance: loss if all similarities are equal.
        same: int ``[N]``, see :func:`twoview.metrics.in_batch_logs`.
        above: similarity above which negatives are left out of the loss; None for no limit.
    """
    z_a, z_b = z_a.detach(), z_b.detach()
    return Step(loss, encoded.features, (z_a, z_b), {**in_batch_logs(z_a, z_b, same, above)}, chance)


def gathered(*tensors: Tensor) -> list[Tensor]:
    """Gather each tensor from all ranks by :func:`twoview.distributed.gather`, with gradients in at least fp32."""
    half = (torch.float16, torch.bfloat16)
    return [gather(tensor.float() if tensor.dtype in half else tensor) for tensor in tensors]


def check_momentum(start: float, end: float | None) -> None:
    """Check that a momentum is in [0, 1) at the start and in [0, 1] at the end; ``end`` may be None.

    Raises:
        UserError: if a value is out of range.
    """
    fixed = "the key encoder would never change; choose a value below 1, and method.momentum_end=1 to end there"
    require(start != 1, f"method.momentum={start}: {fixed}")
    for knob, value in (("momentum", start), ("momentum_end", end)):
        fits = value is None or 0 <= value <= 1
        require(fits, f"method.{knob}={value}: must lie between 0 and 1, such as 0.99")


def check_same(same: str, group_file: str | None) -> None:
    """Check the knobs of known positives.

    Raises:
        UserError: if ``same`` is unknown, or ``group_file`` is missing or has no effect.
    """
    require_choice("method", ("none", "labels", "groups"), same=same)
    missing = "needs method.group_file=FILE.csv with the columns path and group"
    require(same != "groups" or group_file is not None, f"method.same=groups: {missing}")
    unused = f"has no effect with method.same={same}; set method.same=groups"
    require(same == "groups" or group_file is None, f"method.group_file={group_file}: {unused}")


def check_loss_knobs(temperature: float, variant: str = "infonce", **options: Unpack[LossOptions]) -> None:
    """Check the options of the losses by :func:`twoview.variants.check_loss_arguments`.

    Raises:
        UserError: if a value is out of range.
    """
    try:
        check_loss_arguments(temperature, variant, **options)
    except ValueError as error:
        raise UserError(f"method.{error}") from None
