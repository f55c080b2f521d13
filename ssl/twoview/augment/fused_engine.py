"""Views made in few passes over the images: both views of a batch at once, with parameters drawn on the host."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twoview.augment.crops import ExactCrops
from twoview.augment.draws import FIRST_JITTER, Draws
from twoview.augment.jitter import ExactJitter
from twoview.augment.operations import gaussian_blur, solarize
from twoview.augment.recipe import ViewRecipe, blur_kernel
from twoview.augment.whole_batch import Crops, Jitter, WholeBatch

# Largest number of values of a channel that are computed together. On a CPU they stay in its cache (measured).
CPU_BLOCK, GPU_BLOCK = 2**17, 2**25


class _Block(NamedTuple):
    """Views that are computed together.

    Attributes:
        rows: rows of the draws that are computed.
        place: place of these rows among the rows of all blocks.
        group: number of the group of the color jitter.
        whole: rows of the block if the views of all images are computed. What a block has in common depends on them, so
            that a view has the same value, to the last bit, whichever other views are computed with it.
    """

    rows: np.ndarray
    place: slice
    group: int
    whole: np.ndarray


class Engine:
    """Makes the views of a batch; equal to torchvision's operations with the same parameters.

    All parameters are drawn on the host from the seed, so a run has the same views on every device. They are copied to
    the device without the host waiting for it. On a CPU, each operation is computed only for the views for which it was
    drawn; on other devices, for all views together, unless crops are interpolated one by one.

    Args:
        recipes: recipe of the first and of the second view.
        image_size: height and width of the views in pixels.
        channels: number of channels C, not used.
    """

    def __init__(self, recipes: Sequence[ViewRecipe], image_size: int, channels: int) -> None:
        self.recipes, self.size = recipes, image_size
        self.crop: Crops = ExactCrops(recipes, image_size)
        self.jitter: Jitter = ExactJitter(recipes)

    @cached_property
    def whole(self) -> WholeBatch | None:
        """Makes the views on other devices than a CPU; None if crops are interpolated one by one."""
        return WholeBatch(self.recipes, self.size, self.crop, self.jitter) if self.crop.plain else None

    def draw(self, pixels: Tensor, sizes: Tensor | None, seed: int) -> Draws:
        """Draw the parameters of the views of all images.

        Args:
            pixels: uint8 ``[N, C, H, W]``.
            sizes: int64 ``[N, 2]`` on the CPU, height and width of the image in the top left corner of each canvas;
                None if the images fill it.
            seed: seed of the random parameters.
        """
        shape = np.tile(pixels.shape[2:], (len(pixels), 1)) if sizes is None else np.array(sizes.tolist())
        return Draws.of(self.recipes, shape, seed)

    def apply(
        self, pixels: Tensor, draws: Draws, mean: Tensor, std: Tensor, part: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Make both views of some images.

        Args:
            pixels: uint8 ``[N, C, H, W]``, all images of the batch.
            draws: result of :meth:`draw`.
            mean: mean of each channel, ``[C, 1, 1]``, on the scale [0, 1].
            std: standard deviation of each channel, ``[C, 1, 1]``, on the same scale.
            part: positions of the M images whose views are made.

        Returns:
            Two views, fp32 ``[M, C, S, S]`` each, normalized, in channels_last memory format.
        """
        rows = np.arange(2 * len(pixels)).reshape(2, -1)[:, part].ravel()
        together = self.whole is not None and pixels.device.type != "cpu"
        views = (self.make_together if together else self.make_in_groups)(pixels, draws, rows, mean, std)
        return views[: len(rows) // 2], views[len(rows) // 2 :]

    def make_together(self, pixels: Tensor, draws: Draws, rows: np.ndarray, mean: Tensor, std: Tensor) -> Tensor:
        """Make the views of some rows of the draws by the same operations, see :class:`WholeBatch`."""
        columns = draws.table(len(pixels), self.jitter.columns(draws))[rows]
        table = _to_device(torch.from_numpy(columns).float(), pixels.device)
        length = max(1, GPU_BLOCK // max(self.size**2, pixels.shape[2:].numel()))
        parts = [self.whole(pixels, part, mean, std) for part in table.split(length)]  # type: ignore[misc]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def make_in_groups(self, pixels: Tensor, draws: Draws, rows: np.ndarray, mean: Tensor, std: Tensor) -> Tensor:
        """Make the views of some rows of the draws, each operation only where it was drawn."""
        n, c = pixels.shape[:2]
        places = np.full(2 * n, -1)  # place of each row of the draws in the result; -1 for those that are not computed
        places[rows] = np.arange(len(rows))
        blocks = list(self._blocks(draws, places, pixels))
        columns = draws.table(n, self.jitter.columns(draws))[np.concatenate([block.rows for block in blocks])]
        table = _to_device(torch.from_numpy(columns).float(), pixels.device)
        positions = [each for block in blocks for each in _positions(draws, block.rows, places)]
        indices = _to_device(torch.from_numpy(np.concatenate(positions)), pixels.device)
        parts = indices.split(list(map(len, positions)))
        views = torch.empty(len(rows), c, self.size, self.size, device=pixels.device, memory_format=torch.channels_last)
        for i, block in enumerate(blocks):
            images, own, grays, blurred, solarized = parts[5 * i : 5 * i + 5]
            values = table[block.place]
            view = self.crop(pixels, draws, block.rows, images, values, _extent(draws.boxes[block.whole])).div_(255)
            view = self.jitter(view, values[:, FIRST_JITTER:], block.group, grays)
            if len(blurred):
                largest = float(draws.sigmas[block.whole].max())
                soft = gaussian_blur(view[blurred], values[blurred, 5], blur_kernel(self.size), largest)
                view.index_copy_(0, blurred, soft)
            if len(solarized):
                view.index_copy_(0, solarized, solarize(view[solarized]))
            view = view.sub_(mean).div_(std)
            views.index_copy_(0, own, view.contiguous(memory_format=torch.channels_last))
        return views

    def _blocks(self, draws: Draws, places: np.ndarray, pixels: Tensor) -> Iterator[_Block]:
        groups = self.jitter.groups(draws)
        order = groups.argsort(kind="stable")
        on_cpu = pixels.device.type == "cpu"
        # On other devices the whole images are converted to float, on a CPU only the part that is cropped.
        area = self.size**2 if on_cpu else max(self.size**2, pixels.shape[2:].numel())
        length = max(1, (CPU_BLOCK if on_cpu else GPU_BLOCK) // area)
        ends = np.flatnonzero(np.diff(groups[order])) + 1
        done = 0
        for first, last in zip([0, *ends], [*ends, len(order)], strict=True):
            for start in range(first, last, length):
                whole = order[start : min(start + length, last)]
                rows = whole[places[whole] >= 0]
                if len(rows):
                    yield _Block(rows, slice(done, done + len(rows)), int(groups[whole[0]]), whole)
                done += len(rows)


def _extent(boxes: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the smallest box that contains all boxes."""
    top, left = boxes[:, :2].min(0).tolist()
    bottom, right = (boxes[:, :2] + boxes[:, 2:]).max(0).tolist()
    return top, left, bottom, right


def _positions(draws: Draws, rows: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    """Images of the views of a block, their places in the result, and which become gray, blurred and solarized."""
    chosen = (draws.grays, draws.sigmas, draws.solarized)
    return [rows % (len(places) // 2), places[rows], *(np.flatnonzero(values[rows]) for values in chosen)]


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; from pinned memory, since the host waits for copies from other memory."""
    if device.type != "cuda":
        return values.to(device)
    return torch.empty_like(values, pin_memory=True).copy_(values).to(device, non_blocking=True)
