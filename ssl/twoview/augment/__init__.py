"""Random augmentation that makes two views of each image, in batches on the device of the images."""

from twoview.augment.recipe import ViewRecipe
from twoview.augment.two_views import TwoViews, derive_seed

__all__ = ["TwoViews", "ViewRecipe", "derive_seed"]
