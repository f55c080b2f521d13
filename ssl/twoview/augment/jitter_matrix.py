"""Approximate color jitter: one color matrix for each view."""

import numpy as np
import torch
from torch import Tensor

from twoview.augment.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws
from twoview.augment.operations import LUMA, luma

# The color space YIQ: its first axis is the luma, and its other two span a plane in which the hue is an angle.
_TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
# The luma, the color, and the color turned by a quarter, as matrices in YIQ; then, as [3, 9], in RGB.
_IN_YIQ = [[[1, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 1], [0, -1, 0]]]
_PARTS = (np.linalg.inv(_TO_YIQ) @ np.array(_IN_YIQ) @ _TO_YIQ).reshape(3, 9)


class MatrixJitter:
    """Applies all color operations as one matrix, and clamps to [0, 1] once at the end.

    Differs from :class:`twoview.augment.jitter.ExactJitter`: values are not clamped between the operations, and the hue
    is rotated in the color space YIQ, which keeps the luma, instead of HSV, which keeps the largest and the smallest
    channel. The order of the operations then has no effect.
    """

    def groups(self, draws: Draws) -> np.ndarray:
        """Number of the group of each view, int64 ``[M]``: one group for all."""
        return np.zeros(len(draws.flips), dtype=np.int64)

    def columns(self, draws: Draws) -> np.ndarray:
        """Color matrix of each view and factor of its mean luma, float64 ``[M, 10]``."""
        drawn = np.where(draws.jittered[:, None], draws.factors, [1.0, 1.0, 1.0, 0.0])
        scale = drawn[:, BRIGHTNESS] * drawn[:, CONTRAST]
        color, angle = scale * drawn[:, SATURATION] * ~draws.grays, 2 * np.pi * drawn[:, HUE]
        parts = np.stack([scale, color * np.cos(angle), color * np.sin(angle)], 1)
        return np.concatenate([parts @ _PARTS, (drawn[:, BRIGHTNESS] - scale)[:, None]], 1)

    def together(self, views: Tensor, columns: Tensor, grays: Tensor) -> Tensor:
        """Same as :meth:`__call__`."""
        return self(views, columns, 0, grays)

    def __call__(self, views: Tensor, columns: Tensor, group: int, grays: Tensor) -> Tensor:
        """Apply jitter and grayscale.

        Args:
            views: fp32 ``[m, 3, S, S]`` in [0, 1].
            columns: fp32 ``[m, 10]``, rows of :meth:`columns`.
            group: number of the group, not used.
            grays: positions of the views that become gray, not used: the factors contain it.

        Returns:
            fp32 ``[m, 3, S, S]`` in [0, 1].
        """
        mean = luma(views.mean((2, 3), keepdim=True)).flatten(2) * columns[:, 9:, None]
        matrices = columns[:, :9].reshape(-1, 3, 3)
        return torch.baddbmm(mean.expand(-1, 3, 1), matrices, views.flatten(2)).clamp_(0, 1).view_as(views)
