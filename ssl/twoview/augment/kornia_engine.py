"""The random operations of a view, implemented by Kornia."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from kornia import augmentation as K
from torch import Tensor, nn

from twoview.augment.recipe import ViewRecipe, blur_kernel
from twoview.errors import require


@dataclass
class WholeBatch:
    """What determines the views of a batch, and the views once they have been made.

    Attributes:
        seed: seed of the random parameters.
        sizes: int64 ``[N, 2]`` on the CPU, height and width of each image; None if the images fill their canvases.
        views: both views of all images; None before they are made.
    """

    seed: int
    sizes: Tensor | None
    views: tuple[Tensor, Tensor] | None = None


class Engine:
    """Makes the views of a batch by Kornia.

    Draws are made by torch's generator on the device of the images, so they differ between devices. Kornia's crop and
    jitter check their parameters on the host, which waits for a GPU in every batch.

    Kornia draws and applies the parameters of a whole batch together. Parts of a batch are therefore rows of the views
    of the whole batch, which stay in memory as long as the draws.

    Args:
        recipes: recipe of the first and of the second view.
        image_size: height and width of the views in pixels.
        channels: number of channels C, not used.

    Raises:
        UserError: if a recipe asks for antialiasing, which Kornia does not have.
    """

    def __init__(self, recipes: Sequence[ViewRecipe], image_size: int, channels: int) -> None:
        plain = not any(recipe.antialias for recipe in recipes)
        require(plain, "augment.antialias=true: Kornia has no antialiasing; choose augment.engine=fused")
        self.same = recipes[0] == recipes[1]
        self.operations = [kornia_operations(recipe, image_size) for recipe in recipes]

    def draw(self, pixels: Tensor, sizes: Tensor | None, seed: int) -> WholeBatch:
        """Note what determines the views; the arguments are those of :class:`twoview.augment.fused_engine.Engine`."""
        return WholeBatch(seed, sizes)

    def apply(
        self, pixels: Tensor, draws: WholeBatch, mean: Tensor, std: Tensor, part: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Make both views; arguments and result are those of :class:`twoview.augment.fused_engine.Engine`."""
        if draws.views is None:
            draws.views = self._all(pixels, draws, mean, std)
        first, second = draws.views
        return first[part], second[part]

    def _all(self, pixels: Tensor, draws: WholeBatch, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        device, sizes = pixels.device, draws.sizes
        devices = [device] if device.type != "cpu" else []
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(draws.seed)
            images = pixels.float().div_(255)
            if self.same:
                first, second = self._apply(self.operations[0], torch.cat([images, images]), sizes, 2).chunk(2)
            else:
                first, second = (self._apply(operations, images, sizes, 1) for operations in self.operations)
        return first.sub(mean).div_(std), second.sub(mean).div_(std)

    @staticmethod
    def _apply(operations: nn.Sequential, images: Tensor, sizes: Tensor | None, copies: int) -> Tensor:
        if sizes is None:
            return cast(Tensor, operations(images))
        # Kornia crops all images of a batch from the same size: those of different sizes are cropped one by one.
        whole = zip(images, sizes.tolist() * copies, strict=True)
        crops = [operations[0](image[None, :, :height, :width]) for image, (height, width) in whole]
        return cast(Tensor, operations[1:](torch.cat(crops)))


def kornia_operations(recipe: ViewRecipe, image_size: int) -> nn.Sequential:
    """Build the operations of a recipe as one module.

    Each operation equals the torchvision operation with the same parameters. The crop is resized without antialiasing.
    The order of the four color operations is drawn once per batch; all other parameters are drawn for each image.

    Args:
        recipe: parameters of the operations; operations with probability 0 or strength 0 are left out.
        image_size: height and width of the view in pixels.

    Returns:
        A module that maps fp32 ``[N, C, H, W]`` in [0, 1] to fp32 ``[N, C, image_size, image_size]`` in [0, 1].
    """
    brightness, contrast, saturation, hue = recipe.jitter
    kernel = blur_kernel(image_size)
    operations: list[nn.Module] = [
        # The mode "slice" equals torchvision.transforms.functional.resized_crop without antialiasing, bit for bit.
        K.RandomResizedCrop(
            (image_size, image_size),
            tuple(recipe.crop_scale),
            tuple(recipe.crop_ratio),
            resample=recipe.interpolation,
            align_corners=False,
            cropping_mode="slice",
        )
    ]
    if recipe.flip_p:
        operations.append(K.RandomHorizontalFlip(p=recipe.flip_p))
    if recipe.jitter_p and any(recipe.jitter):
        operations.append(K.ColorJitter(brightness, contrast, saturation, hue, p=recipe.jitter_p))
    if recipe.gray_p:
        operations.append(K.RandomGrayscale(p=recipe.gray_p))
    if recipe.blur_p:
        operations.append(K.RandomGaussianBlur((kernel, kernel), tuple(recipe.blur_sigma), p=recipe.blur_p))
    if recipe.solarize_p:
        operations.append(K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=recipe.solarize_p))
    return nn.Sequential(*operations)
