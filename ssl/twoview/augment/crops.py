"""Random resized crops of a batch of images, with flips."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.augment.draws import Draws
from twoview.augment.recipe import ViewRecipe

SLICED_FROM = 96  # size of the views from which cropping one by one is faster on a CPU (measured)
Extent = tuple[int, int, int, int]


class ExactCrops:
    """Crops as ``torchvision.transforms.functional.resized_crop`` makes them.

    Bilinear crops without antialiasing are computed together by ``grid_sample``; other crops, and large crops on a CPU,
    one by one.

    Args:
        recipes: recipes of the views; row r of the draws belongs to image r % N and recipe r // N of N images.
        size: height and width of the views in pixels.
    """

    def __init__(self, recipes: Sequence[ViewRecipe], size: int) -> None:
        self.recipes, self.size = recipes, size
        self.plain = all(recipe.interpolation == "bilinear" and not recipe.antialias for recipe in recipes)

    def __call__(
        self, pixels: Tensor, draws: Draws, rows: np.ndarray, images: Tensor, values: Tensor, extent: Extent
    ) -> Tensor:
        """Crop, resize and flip.

        Args:
            pixels: uint8 ``[N, C, H, W]``.
            draws: random parameters of all views.
            rows: int64 ``[M]``, the rows of the draws that are computed.
            images: int64 ``[M]`` on the device of ``pixels``, positions of the images.
            values: fp32 ``[M, 5]`` on the same device: the boxes, and -1 for a flip, else 1.
            extent: top, left, bottom and right of a box that contains all boxes. The last bits of the result depend on
                it.

        Returns:
            fp32 ``[M, C, size, size]`` in [0, 255].
        """
        if self.plain and not (pixels.device.type == "cpu" and self.size >= SLICED_FROM):
            return self.sampled(pixels, images, values, extent)
        boxes = draws.boxes[rows]
        views = torch.empty(len(rows), pixels.shape[1], self.size, self.size, device=pixels.device)
        for i, (row, (top, left, height, width)) in enumerate(zip(rows.tolist(), boxes.tolist(), strict=True)):
            recipe, image = self.recipes[row // len(pixels)], row % len(pixels)
            part = pixels[image : image + 1, :, top : top + height, left : left + width].float()
            how = {"mode": recipe.interpolation, "antialias": recipe.antialias}
            view = F.interpolate(part, (self.size, self.size), align_corners=False, **how)[0]
            views[i] = view.flip(-1) if draws.flips[row] else view
        return views.clamp_(0, 255)  # bicubic interpolation exceeds the range

    def sampled(self, pixels: Tensor, images: Tensor, values: Tensor, extent: Extent) -> Tensor:
        """Crop, resize and flip all together, by bilinear interpolation; arguments are those of :meth:`__call__`."""
        # Only the part of the images that contains all boxes is converted to float.
        top, left, bottom, right = extent
        part = pixels.index_select(0, images)[:, :, top:bottom, left:right].float()
        rows, columns = _places(values, self.size)
        # A place outside the box would mix in pixels beside the crop.
        low, high = values[:, :2, None], values[:, :2, None] + values[:, 2:4, None] - 1
        rows, columns = torch.stack([rows, columns], 1).clamp(low, high).unbind(1)
        y, x = ((rows - top) * 2 + 1) / (bottom - top) - 1, ((columns - left) * 2 + 1) / (right - left) - 1
        grid = torch.stack([x[:, None].expand(-1, self.size, -1), y[..., None].expand(-1, -1, self.size)], -1)
        return F.grid_sample(part, grid, padding_mode="border", align_corners=False)


class NearestCrops:
    """Crops whose pixels are the nearest pixels of the image, without interpolation.

    Args:
        size: height and width of the views in pixels.
    """

    plain = True

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(
        self, pixels: Tensor, draws: Draws, rows: np.ndarray, images: Tensor, values: Tensor, extent: Extent
    ) -> Tensor:
        """Crop, resize and flip; arguments and result are those of :class:`ExactCrops`."""
        return self.sampled(pixels, images, values, extent)

    def sampled(self, pixels: Tensor, images: Tensor, values: Tensor, extent: Extent) -> Tensor:
        """Crop, resize and flip; arguments and result are those of :class:`ExactCrops`."""
        c, height, width = pixels.shape[1:]
        kind = torch.int32 if pixels.numel() < 2**31 else torch.int64
        y, x = (places.round_().to(kind) for places in _places(values, self.size))
        first = images.to(kind)[:, None] * c + torch.arange(c, device=pixels.device, dtype=kind)
        chosen = first[:, :, None, None] * (height * width) + (y * width)[:, None, :, None] + x[:, None, None]
        return pixels.reshape(-1).index_select(0, chosen.view(-1)).view(-1, c, self.size, self.size).float()


def _places(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the image at which the pixels of the views lie, fp32 ``[M, size]`` each."""
    steps = (torch.arange(size, device=values.device, dtype=torch.float32) + 0.5) / size - 0.5  # in (-0.5, 0.5)
    top, left, height, width, direction = values[:, :5].unsqueeze(2).unbind(1)
    return top - 0.5 + height * (steps + 0.5), left - 0.5 + width * (direction * steps + 0.5)
