"""Interface of all methods: encode the views of a batch, compute a loss, and update state at two named points."""

from dataclasses import dataclass, field
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from twoview.backbones import sync_batch_norm
from twoview.distributed import gather, rank_and_world
from twoview.errors import UserError, require, require_choice
from twoview.losses import VariantParameters, check_loss_arguments
from twoview.methods.groups import in_groups
from twoview.metrics import in_batch_logs


class Encoded(NamedTuple):
    """Outputs of the networks for the V views of N images; row i of each tensor belongs to image i.

    Attributes:
        features: ``[N, F]`` backbone features of the first view, without gradient.
        embeddings: ``[N, D]`` of each view, with gradient.
        predictions: ``[N, D]`` of each view, with gradient, of methods with a prediction head.
        targets: ``[N, D]`` outputs of a momentum encoder, without gradient.
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
        embeddings: ``[N, D]`` of each view, without gradient, for monitoring; the first two are treated as a positive
            pair.
        logs: scalars to log beside the loss.
        chance: loss of uninformative embeddings (:func:`twoview.losses.chance_level`); None where the method has none.
        keys: ``[M, D]`` and int64 image indices ``[M]`` to store after the batch; None where the method stores none.
    """

    loss: Tensor
    features: Tensor
    embeddings: tuple[Tensor, ...]
    logs: dict[str, Tensor | float] = field(default_factory=dict)
    chance: float | None = None
    keys: tuple[Tensor, Tensor] | None = None


class Method(nn.Module):
    """Base class: a backbone ``[N, C, H, W] -> [N, F]``, a head ``[N, F] -> [N, D]``, and a loss of their outputs.

    Subclasses implement :meth:`loss`, and :meth:`encode` if they have further networks. Neither changes state: state is
    updated in :meth:`after_update` (once per optimizer step) and :meth:`after_batch` (once per batch). Losses see the
    embeddings of all ranks.

    Args:
        backbone: the network.
        head: projection head on its features.
        bn: which images BatchNorm normalizes together, since batch statistics can reveal which images form a pair:
            "plain", all images of a rank; "split", images i mod G separately, as on G devices; "sync", the images of
            all ranks (CUDA only). :class:`twoview.methods.MoCo` has "shuffle" too.
        bn_groups: number G of groups over all ranks; at least 2 and at least the number of ranks.

    Raises:
        UserError: an unknown ``bn``, or fewer than two groups.
    """

    bn_choices: tuple[str, ...] = ("plain", "split", "sync")

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
    def ready(self) -> bool:
        """Whether the next batch may change the weights; False while a queue of negatives is still empty."""
        return True

    def synced(self, module: nn.Module) -> nn.Module:
        """The module, with synchronized BatchNorm if ``bn`` is "sync"."""
        return sync_batch_norm(module) if self.bn == "sync" else module

    @property
    def groups(self) -> int:
        """Number of groups in which BatchNorm normalizes the images of this rank."""
        world = rank_and_world()[1]
        if self.bn not in ("split", "shuffle") or self.bn_groups <= world:
            return 1
        divisible = self.bn_groups % world == 0
        require(divisible, f"method.bn_groups={self.bn_groups}: cannot be divided among {world} processes")
        return self.bn_groups // world

    def embed(self, *views: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features of the first view without gradient, and embeddings of each view, from one pass over all views."""
        features = in_groups(self.backbone, views, self.groups)
        return features[0].detach(), tuple(in_groups(self.head, features, self.groups))

    def encode(self, *views: Tensor) -> Encoded:
        """Apply the networks: here backbone and head, to all views in one pass. May be called on parts of a batch.

        Args:
            views: V tensors ``[N, C, H, W]``; row i of each is a view of image i.
        """
        return Encoded(*self.embed(*views))

    def loss(self, encoded: Encoded, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """Compute the loss of a whole batch; applies no network.

        Args:
            encoded: outputs of :meth:`encode` for all N images of this rank.
            ids: int64 ``[N]`` index of each image in the data set.
            labels: int64 ``[N]``, -1 where unknown.
        """
        raise NotImplementedError

    def forward(self, *views: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """:meth:`encode`, then :meth:`loss`."""
        return self.loss(self.encode(*views), ids, labels)

    def after_update(self, progress: float) -> None:
        """Called once per optimizer step; ``progress`` is the completed share of the run, in [0, 1]."""

    def after_batch(self, step: Step) -> None:
        """Called once per batch, after the optimizer step if the batch ended one."""


def in_batch_step(encoded: Encoded, loss: Tensor, z_a: Tensor, z_b: Tensor, chance: float) -> Step:
    """Step of a method whose negatives are the other images of the batch.

    Args:
        encoded: outputs of the networks.
        loss: scalar.
        z_a: ``[N, D]`` gathered embeddings, logged as positive pairs with ``z_b``.
        z_b: ``[N, D]``.
        chance: loss of uninformative embeddings.
    """
    z_a, z_b = z_a.detach(), z_b.detach()
    return Step(loss, encoded.features, (z_a, z_b), {**in_batch_logs(z_a, z_b)}, chance)


def gathered(*tensors: Tensor) -> list[Tensor]:
    """Each tensor concatenated over all ranks; gradients are summed in at least fp32."""
    half = (torch.float16, torch.bfloat16)
    return [gather(tensor.float() if tensor.dtype in half else tensor) for tensor in tensors]


def check_momentum(start: float, end: float | None) -> None:
    """Refuse a momentum outside of [0, 1].

    Raises:
        UserError: naming the knob, its value and what to do.
    """
    for knob, value in (("momentum", start), ("momentum_end", end)):
        fits = value is None or 0 <= value <= 1
        require(fits, f"method.{knob}={value}: must lie between 0 and 1, such as 0.99")


def check_loss_knobs(temperature: float, variant: str = "infonce", **parameters: Unpack[VariantParameters]) -> None:
    """Refuse parameters that the losses cannot take.

    Raises:
        UserError: naming the knob, its value and what to do.
    """
    try:
        check_loss_arguments(temperature, variant, **parameters)
    except ValueError as error:
        raise UserError(f"method.{error}") from None
