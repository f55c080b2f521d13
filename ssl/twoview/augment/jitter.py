"""Color jitter: brightness, contrast, saturation and hue in an order that is drawn for each view."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from twoview.augment.draws import CONTRAST, HUE, SATURATION, Draws
from twoview.augment.operations import blend, luma, shift_hue
from twoview.augment.recipe import ViewRecipe


class ExactJitter:
    """Applies the operations one after the other, each clamped to [0, 1], as ``torchvision.transforms.ColorJitter``.

    Brightness, contrast and saturation are one formula with different coefficients (see :func:`blend`). Views whose
    hue comes at the same place of the order are therefore computed together.

    Args:
        recipes: recipes of the views; operations with strength 0 in all of them are left out.
    """

    def __init__(self, recipes: Sequence[ViewRecipe]) -> None:
        self.operations = [i for i in range(4) if any(recipe.jitter_p and recipe.jitter[i] for recipe in recipes)]

    def groups(self, draws: Draws) -> np.ndarray:
        """Number of the group of each view, int64 ``[M]``; -1 for views without jitter."""
        orders = self._orders(draws)
        place = (orders == HUE).argmax(1) if HUE in self.operations else np.full(len(orders), len(self.operations))
        return np.where(draws.jittered, place, -1)

    def columns(self, draws: Draws) -> np.ndarray:
        """Coefficients of each view, float64 ``[M, K]``."""
        orders = self._orders(draws)
        factors = np.take_along_axis(draws.factors, orders, 1)
        factors = np.where(orders == HUE, 1.0, factors)
        blends = np.stack([factors, (1 - factors) * (orders == CONTRAST), (1 - factors) * (orders == SATURATION)], 2)
        return np.concatenate([draws.factors[:, HUE:], blends.reshape(len(orders), -1)], 1)

    def __call__(self, views: Tensor, columns: Tensor, group: int, grays: Tensor) -> Tensor:
        """Apply jitter, then grayscale.

        Args:
            views: fp32 ``[m, C, S, S]`` in [0, 1], all of one group; changed in place.
            columns: fp32 ``[m, K]``, rows of :meth:`columns`.
            group: number of the group.
            grays: int64, positions of the views that become gray.

        Returns:
            fp32 ``[m, C, S, S]`` in [0, 1].
        """
        for place in range(len(self.operations) if group >= 0 else 0):
            if place == group:
                views = shift_hue(views, columns[:, :1, None])
            else:
                views = blend(views, *(columns[:, i, None, None, None] for i in range(3 * place + 1, 3 * place + 4)))
        if len(grays):
            views.index_copy_(0, grays, luma(views[grays]).expand(-1, 3, -1, -1))
        return views

    def _orders(self, draws: Draws) -> np.ndarray:
        return draws.orders[np.isin(draws.orders, self.operations)].reshape(len(draws.orders), len(self.operations))
