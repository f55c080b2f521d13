"""What every method has: a backbone, a head, and two places in which state may move."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twoview.backbones import sync_batch_norm
from twoview.distributed import gather, rank_and_world
from twoview.errors import UserError
from twoview.losses import VARIANTS
from twoview.methods.groups import in_groups
from twoview.metrics import in_batch_logs
from twoview.negatives import NegativeQueue


@dataclass
class Step:
    """What a method makes of two views.

    Attributes:
        loss: scalar, at least fp32, with gradient.
        features: ``[N, F]`` backbone features of the first view, without gradient.
        logs: scalars for the log.
        embeddings: ``[N, D]`` of each view, without gradient, for the monitors.
        keys: ``[M, D]`` and int64 image indices ``[M]`` that go into the queue after the batch, if there is one.
    """

    loss: Tensor
    features: Tensor
    logs: dict[str, Tensor | float]
    embeddings: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor] | None = None


class Method(nn.Module):
    """A backbone ``[N, C, H, W] -> [N, F]`` and a head ``[N, F] -> [N, D]``, and how their loss is made.

    ``forward`` changes no state; it moves in ``after_update`` (once an optimiser step) and ``after_batch``
    (once a batch). Losses see the embeddings of all ranks. A method with a :class:`twoview.negatives.NegativeQueue`
    calls it ``queue``.

    Args:
        backbone: the network.
        head: on its features.
        bn: what BatchNorm sees, which can betray which images were together: "plain", the batch of a rank; "split",
            each of the groups i mod G alone, as on G devices; "sync", all ranks (CUDA only). See :class:`MoCo` for
            "shuffle".
        bn_groups: G, over all ranks; no fewer than there are ranks.

    Raises:
        UserError: any other ``bn``, or fewer than two groups.
    """

    queue: NegativeQueue
    bn_choices: tuple[str, ...] = ("plain", "split", "sync")

    def __init__(self, backbone: nn.Module, head: nn.Module, bn: str = "plain", bn_groups: int = 2) -> None:
        super().__init__()
        if bn not in self.bn_choices:
            raise UserError(f"method.bn={bn}: choose one of {', '.join(self.bn_choices)}")
        if bn_groups < 2:
            raise UserError(f"method.bn_groups={bn_groups}: must be at least 2; for one group choose method.bn=plain")
        if bn == "sync" and not torch.cuda.is_available():
            raise UserError("method.bn=sync: needs a GPU; on a CPU choose plain or split")
        self.bn, self.bn_groups = bn, bn_groups
        self.backbone = self.synced(backbone)
        self.head = self.synced(head)

    @property
    def ready(self) -> bool:
        """Whether a batch may change the weights; not before a queue holds its first keys."""
        queue = getattr(self, "queue", None)
        return queue is None or len(queue) > 0

    def synced(self, module: nn.Module) -> nn.Module:
        """The module with BatchNorm over all ranks, if that was asked for."""
        return sync_batch_norm(module) if self.bn == "sync" else module

    @property
    def groups(self) -> int:
        """Groups that this rank's images are normalised in."""
        world = rank_and_world()[1]
        if self.bn not in ("split", "shuffle") or self.bn_groups <= world:
            return 1
        if self.bn_groups % world:
            raise UserError(f"method.bn_groups={self.bn_groups}: cannot be divided among {world} processes")
        return self.bn_groups // world

    def embed(self, *views: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features of the first view without gradient, and each view's embeddings, from one pass over all of them."""
        features = in_groups(self.backbone, views, self.groups)
        return features[0].detach(), in_groups(self.head, features, self.groups)

    def forward(self, view_a: Tensor, view_b: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> Step:
        """The loss of one batch.

        Args:
            view_a: ``[N, C, H, W]`` first views.
            view_b: ``[N, C, H, W]`` second views, row i of the same image.
            ids: int64 ``[N]`` index of each image.
            labels: int64 ``[N]``, -1 where unknown.
        """
        raise NotImplementedError

    def after_update(self, progress: float) -> None:
        """Called once an optimiser step; ``progress`` is the share of the run that is done, in [0, 1]."""

    def after_batch(self, step: Step) -> None:
        """Called once a batch, after its optimiser step if it had one: the keys of all ranks go into the queue."""
        if step.keys is not None:
            self.queue.push(*gathered(*step.keys))


def in_batch_step(loss: Tensor, features: Tensor, z_a: Tensor, z_b: Tensor, chance: float) -> Step:
    """The step of a method whose negatives are the batch; ``z_a`` and ``z_b`` are logged as pairs."""
    z_a, z_b = z_a.detach(), z_b.detach()
    return Step(loss, features, {"chance": chance, **in_batch_logs(z_a, z_b)}, (z_a, z_b))


def gathered(*tensors: Tensor) -> list[Tensor]:
    """Each tensor of all ranks; gradients are summed in at least fp32."""
    half = (torch.float16, torch.bfloat16)
    return [gather(tensor.float() if tensor.dtype in half else tensor) for tensor in tensors]


def check_momentum(start: float, end: float | None) -> None:
    """Refuse a momentum that is no share.

    Raises:
        UserError: naming the knob, its value and what to do.
    """
    for knob, value in (("momentum", start), ("momentum_end", end)):
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"method.{knob}={value}: must lie between 0 and 1, such as 0.99")


def check_loss_knobs(temperature: float, variant: str = "infonce") -> None:
    """Refuse a temperature or variant that no loss can take, before any work is done.

    Raises:
        UserError: naming the knob, its value and what to do.
    """
    if not 0 < temperature < math.inf:
        raise UserError(f"method.temperature={temperature}: must be above 0, such as 0.1 or 0.5")
    if variant not in VARIANTS:
        raise UserError(f"method.variant={variant}: choose one of {', '.join(VARIANTS)}")
