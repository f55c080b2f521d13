"""The fused engine with approximate crops and color jitter, for speed."""

from collections.abc import Sequence

from twoview.augment import fused_engine
from twoview.augment.crops import NearestCrops
from twoview.augment.jitter import ExactJitter
from twoview.augment.jitter_matrix import MatrixJitter
from twoview.augment.recipe import ViewRecipe


class Engine(fused_engine.Engine):
    """Makes the views of a batch with nearest-pixel crops, and colors that are jittered by one matrix for each view.

    The arguments are those of :class:`twoview.augment.fused_engine.Engine`. ``interpolation`` and ``antialias`` of the
    recipes are ignored. Images without three channels have exact jitter.
    """

    def __init__(self, recipes: Sequence[ViewRecipe], image_size: int, channels: int) -> None:
        super().__init__(recipes, image_size, channels)
        self.crop = NearestCrops(image_size)
        self.jitter = MatrixJitter() if channels == 3 else ExactJitter(recipes)
