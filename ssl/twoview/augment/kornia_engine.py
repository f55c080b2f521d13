"""The random operations of a view, implemented by Kornia."""

from kornia import augmentation as K
from torch import nn

from twoview.augment.recipe import ViewRecipe


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
    kernel = max(3, image_size // 10 | 1)
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
