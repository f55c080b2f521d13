"""What every method has: a backbone, a head, and two places in which state may move."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from twoview.errors import UserError
from twoview.losses import VARIANTS


@dataclass
class Step:
    """What a method makes of two views.

    Attributes:
        loss: scalar, at least fp32, with gradient.
        features: ``[N, F]`` backbone features of the first view, without gradient.
        logs: scalars for the log.
        embeddings: ``[N, D]`` of each view, without gradient, for the monitors.
    """

    loss: Tensor
    features: Tensor
    logs: dict[str, Tensor | float]
    embeddings: tuple[Tensor, Tensor]


class Method(nn.Module):
    """A backbone ``[N, C, H, W] -> [N, F]`` and a head ``[N, F] -> [N, D]``, and how their loss is made.

    ``forward`` changes no state; it moves in ``after_update`` (once an optimiser step) and ``after_batch``
    (once a batch).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

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
        """Called once a batch, after its optimiser step if it had one."""


def check_loss_knobs(temperature: float, variant: str) -> None:
    """Refuse a temperature or variant that no loss can take, before any work is done.

    Raises:
        UserError: naming the knob, its value and what to do.
    """
    if not 0 < temperature < math.inf:
        raise UserError(f"method.temperature={temperature}: must be above 0, such as 0.1 or 0.5")
    if variant not in VARIANTS:
        raise UserError(f"method.variant={variant}: choose one of {', '.join(VARIANTS)}")
