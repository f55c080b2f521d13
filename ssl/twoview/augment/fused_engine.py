"""Views made in few passes over the images: both views of a batch at once, with parameters drawn on the host."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twoview.augment.crops import ExactCrops, NearestCrops
from twoview.augment.draws import Draws
from twoview.augment.jitter import ExactJitter
from twoview.augment.jitter_matrix import MatrixJitter
from twoview.augment.operations import gaussian_blur, solarize
from twoview.augment.recipe import ViewRecipe, blur_kernel

# Largest number of values of a channel that are computed together. On a CPU they stay in its cache (measured).
CPU_BLOCK, GPU_BLOCK = 2**17, 2**25
Crops = ExactCrops | NearestCrops
Jitter = ExactJitter | MatrixJitter


class _Block(NamedTuple):
    """Views that are computed together: their rows in the draws, their place in the sorted rows, and their group."""

    rows: np.ndarray
    place: slice
    group: int


class Engine:
    """Makes the views of a batch; equal to torchvision's operations with the same parameters.

    All parameters are drawn on the host from the seed, so a run has the same views on every device. They are copied to
    the device in two transfers that the host does not wait for.

    Args:
        recipes: recipe of the first and of the second view.
        image_size: height and width of the views in pixels.
        channels: number of channels C, not used.
    """

    def __init__(self, recipes: Sequence[ViewRecipe], image_size: int, channels: int) -> None:
        self.recipes, self.size = recipes, image_size
        self.crop: Crops = ExactCrops(recipes, image_size)
        self.jitter: Jitter = ExactJitter(recipes)

    def __call__(
        self, pixels: Tensor, sizes: Tensor | None, seed: int, mean: Tensor, std: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Make both views.

        Args:
            pixels: uint8 ``[N, C, H, W]``.
            sizes: int64 ``[N, 2]`` on the CPU, height and width of the image in the top left corner of each canvas;
                None if the images fill it.
            seed: seed of the random parameters.
            mean: mean of each channel, ``[C, 1, 1]``, on the scale [0, 1].
            std: standard deviation of each channel, ``[C, 1, 1]``, on the same scale.

        Returns:
            Two views, fp32 ``[N, C, S, S]`` each, normalized, in channels_last memory format.
        """
        n, c = pixels.shape[:2]
        shape = np.tile(pixels.shape[2:], (n, 1)) if sizes is None else np.array(sizes.tolist())
        draws = Draws.of(self.recipes, shape, seed)
        groups = self.jitter.groups(draws)
        order = groups.argsort(kind="stable")
        blocks = list(self._blocks(order, groups, pixels))
        directions, sigmas = np.where(draws.flips, -1, 1)[:, None], draws.sigmas[:, None]
        columns = np.concatenate([draws.boxes, directions, sigmas, self.jitter.columns(draws)], 1)
        table = _to_device(torch.from_numpy(columns[order]).float(), pixels.device)
        places = [places for block in blocks for places in _places(draws, block.rows, n)]
        indices = _to_device(torch.from_numpy(np.concatenate(places)), pixels.device).split(list(map(len, places)))
        views = torch.empty(2 * n, c, self.size, self.size, device=pixels.device, memory_format=torch.channels_last)
        for i, block in enumerate(blocks):
            images, rows, grays, blurred, solarized = indices[5 * i : 5 * i + 5]
            values = table[block.place]
            view = self.crop(pixels, draws, block.rows, images, values).div_(255)
            view = self.jitter(view, values[:, 6:], block.group, grays)
            if len(blurred):
                largest = float(draws.sigmas[block.rows].max())
                soft = gaussian_blur(view[blurred], values[blurred, 5], blur_kernel(self.size), largest)
                view.index_copy_(0, blurred, soft)
            if len(solarized):
                view.index_copy_(0, solarized, solarize(view[solarized]))
            view = view.sub_(mean).div_(std)
            views.index_copy_(0, rows, view.contiguous(memory_format=torch.channels_last))
        return views[:n], views[n:]

    def _blocks(self, order: np.ndarray, groups: np.ndarray, pixels: Tensor) -> Iterator[_Block]:
        on_cpu = pixels.device.type == "cpu"
        # On other devices the whole images are converted to float, on a CPU only the part that is cropped.
        area = self.size**2 if on_cpu else max(self.size**2, pixels.shape[2:].numel())
        length = max(1, (CPU_BLOCK if on_cpu else GPU_BLOCK) // area)
        ends = np.flatnonzero(np.diff(groups[order])) + 1
        for first, last in zip([0, *ends], [*ends, len(order)], strict=True):
            for start in range(first, last, length):
                place = slice(start, min(start + length, last))
                yield _Block(order[place], place, int(groups[order[start]]))


def _places(draws: Draws, rows: np.ndarray, n: int) -> list[np.ndarray]:
    """Images and rows of the views of a block; places in it of the views that become gray, blurred and solarized."""
    chosen = (draws.grays, draws.sigmas, draws.solarized)
    return [rows % n, rows, *(np.flatnonzero(values[rows]) for values in chosen)]


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; from pinned memory, since the host waits for copies from other memory."""
    if device.type != "cuda":
        return values.to(device)
    return torch.empty_like(values, pin_memory=True).copy_(values).to(device, non_blocking=True)
