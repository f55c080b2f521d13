"""All views of a batch by the same operations, whatever was drawn for them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twoview.augment.crops import ExactCrops, NearestCrops
from twoview.augment.draws import FIRST_JITTER
from twoview.augment.jitter import ExactJitter
from twoview.augment.jitter_matrix import MatrixJitter
from twoview.augment.operations import gaussian_blur, solarize
from twoview.augment.recipe import ViewRecipe, blur_kernel

Crops = ExactCrops | NearestCrops
Jitter = ExactJitter | MatrixJitter
NO_BLUR = 1e-3  # standard deviation in pixels for views without blur: the weights of all other pixels are 0 in fp32


class WholeBatch(nn.Module):
    """Makes views by operations whose number and shapes do not depend on the draws; for GPUs.

    A GPU computes an operation on a few hundred small views faster than the host starts it. Operations that change
    nothing in many views then cost less than one group of views for each order of the operations. Besides,
    ``torch.compile`` can join such operations to a few kernels.

    Args:
        recipes: recipes of the views.
        size: height and width of the views in pixels.
        crop: crops, all of them interpolated together.
        jitter: color jitter.
    """

    def __init__(self, recipes: Sequence[ViewRecipe], size: int, crop: Crops, jitter: Jitter) -> None:
        super().__init__()
        self.size, self.crop, self.jitter = size, crop, jitter
        self.largest_sigma = max((recipe.blur_sigma[1] for recipe in recipes if recipe.blur_p), default=0.0)
        self.solarizes = any(recipe.solarize_p for recipe in recipes)

    def forward(self, pixels: Tensor, table: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Make views.

        Args:
            pixels: uint8 ``[N, C, H, W]``.
            table: fp32 ``[M, K]``, rows of :meth:`twoview.augment.draws.Draws.table`.
            mean: mean of each channel, ``[C, 1, 1]``, on the scale [0, 1].
            std: standard deviation of each channel, ``[C, 1, 1]``, on the same scale.

        Returns:
            fp32 ``[M, C, size, size]``, normalized, in channels_last memory format.
        """
        sigmas, grays, solarized, images = table[:, 5:FIRST_JITTER].unbind(1)
        views = self.crop.sampled(pixels, images.long(), table, (0, 0, *pixels.shape[2:])).div_(255)
        views = self.jitter.together(views, table[:, FIRST_JITTER:], grays > 0)
        if self.largest_sigma:
            views = gaussian_blur(views, sigmas.clamp(min=NO_BLUR), blur_kernel(self.size), self.largest_sigma)
        if self.solarizes:
            views = torch.where(solarized[:, None, None, None] > 0, solarize(views), views)
        return views.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
