"""Color jitter: brightness, contrast, saturation and hue in an order that is drawn for each view."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from twoview.augment.draws import CONTRAST, HUE, SATURATION, Draws
from twoview.augment.operations import blend, luma, shift_hue
from twoview.augment.recipe import ViewRecipe


class ExactJitter:
    """Applies the operations one after the other, each clamped to [0, 1], as ``torchvision.transforms.ColorJitter``.

    Brightness, contrast and saturation are one formula with different coefficients (see :func:`blend`). Views whose
    hue comes at the same place of the order are therefore computed together. Views of all groups can be computed
    together too, at the price of operations that change nothing.

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
        """Coefficients of each operation of each view, in the order of the view, float64 ``[M, 4 K]``."""
        orders = self._orders(draws)
        drawn, is_hue = np.take_along_axis(draws.factors, orders, 1), orders == HUE
        jittered = draws.jittered[:, None]
        factors = np.where(is_hue | ~jittered, 1.0, drawn)
        blends = [factors, (1 - factors) * (orders == CONTRAST), (1 - factors) * (orders == SATURATION)]
        return np.stack([*blends, np.where(is_hue & jittered, drawn, 0.0)], 2).reshape(len(orders), -1)

    def together(self, views: Tensor, columns: Tensor, grays: Tensor) -> Tensor:
        """Apply jitter, then grayscale, to views of all groups.

        Args:
            views: fp32 ``[M, C, S, S]`` in [0, 1]; changed in place.
            columns: fp32 ``[M, 4 K]``, rows of :meth:`columns`.
            grays: bool ``[M]``, which views become gray.

        Returns:
            fp32 ``[M, C, S, S]`` in [0, 1].
        """
        for place in range(len(self.operations)):
            of_place = columns[:, 4 * place : 4 * place + 4, None, None]
            views = blend(views, *(of_place[:, i : i + 1] for i in range(3)))
            if HUE in self.operations:
                views = torch.where(of_place[:, 3:] == 0, views, shift_hue(views, of_place[:, 3]))
        return torch.where(grays[:, None, None, None], luma(views), views) if views.shape[1] == 3 else views

    def __call__(self, views: Tensor, columns: Tensor, group: int, grays: Tensor) -> Tensor:
        """Apply jitter, then grayscale.

        Args:
            views: fp32 ``[m, C, S, S]`` in [0, 1], all of one group; changed in place.
            columns: fp32 ``[m, 4 K]``, rows of :meth:`columns`.
            group: number of the group.
            grays: int64, positions of the views that become gray.

        Returns:
            fp32 ``[m, C, S, S]`` in [0, 1].
        """
        for place in range(len(self.operations) if group >= 0 else 0):
            of_place = columns[:, 4 * place : 4 * place + 4, None, None]
            if place == group:
                views = shift_hue(views, of_place[:, 3])
            else:
                views = blend(views, *(of_place[:, i : i + 1] for i in range(3)))
        if len(grays):
            views.index_copy_(0, grays, luma(views[grays]).expand(-1, 3, -1, -1))
        return views

    def _orders(self, draws: Draws) -> np.ndarray:
        return draws.orders[np.isin(draws.orders, self.operations)].reshape(len(draws.orders), len(self.operations))
