"""Two augmented views of each image of a batch."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from twoview.augment.recipe import ViewRecipe
from twoview.errors import require, require_choice

log = logging.getLogger(__name__)

ENGINES = ("fused", "fast", "kornia")  # each is the class Engine of the file NAME_engine.py


class TwoViews(nn.Module):
    """Make two random views of each image of a batch.

    Random parameters are drawn separately for each image and each view. The recipe is adjusted to the images:
    saturation, hue and grayscale are left out unless there are three channels, flips are left out if ``allow_flip`` is
    False, and no crop is smaller than ``min_crop_area``. These adjustments are logged at level DEBUG.

    Args:
        image_size: height and width of the views in pixels.
        channels: number of channels C of the images.
        mean: mean of each of the C channels, in [0, 1].
        std: standard deviation of each of the C channels on the same scale, > 0.
        view_b: fields of the recipe that differ for the second view, such as ``{"blur_p": 0.1, "solarize_p": 0.2}``;
            empty if both views use the same recipe.
        allow_flip: whether horizontal flips preserve the meaning of the images.
        min_crop_area: smallest share of the area of an image that a crop may have, in [0, 1].
        engine: implementation of the operations. "fused" and "kornia" equal torchvision's operations with the same
            parameters, but Kornia draws one order of the color operations for all images of a batch, and waits for a
            GPU. "fast" has approximate crops and color jitter, see :mod:`twoview.augment.fast_engine`. "auto" is
            "fused", which was faster than Kornia at every size that was measured.
        recipe: fields of :class:`twoview.augment.ViewRecipe`, such as ``blur_p=0.0``.

    Raises:
        UserError: if ``min_crop_area``, a field of the recipe or a value of ``view_b`` is out of range, if ``view_b``
            has an unknown name, or if the engine is unknown or cannot apply the recipe.

    Example:
        >>> views = TwoViews(image_size=24, channels=3, mean=[0.5] * 3, std=[0.25] * 3, blur_p=0.0)
        >>> images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        >>> view_a, view_b = views(images, key=(0, 1))
        >>> view_a.shape, view_a.dtype, bool((view_a == view_b).all())
        (torch.Size([4, 3, 24, 24]), torch.float32, False)
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        view_b: Mapping[str, Any] = {},
        allow_flip: bool = True,
        min_crop_area: float = 0.0,
        engine: Literal["auto", "fused", "fast", "kornia"] = "auto",
        **recipe: Any,
    ) -> None:
        super().__init__()
        require(0 <= min_crop_area <= 1, f"data.min_crop_area={min_crop_area}: must lie in [0, 1]")
        self.image_size, self.channels = image_size, channels
        self.limits: dict[str, Any] = {"channels": channels, "allow_flip": allow_flip, "min_crop_area": min_crop_area}
        given = ViewRecipe(**recipe)
        self.recipes = (given.adjusted(**self.limits), given.changed(view_b).adjusted(**self.limits))
        before, after = asdict(given), asdict(self.recipes[0])
        if changes := {knob: value for knob, value in after.items() if value != before[knob]}:
            log.debug("augment: recipe adjusted for these images %s: %s", self.limits, changes)
        require_choice("augment", ("auto", *ENGINES), engine=engine)
        self.engine_name = ENGINES[0] if engine == "auto" else engine
        module = importlib.import_module(f"twoview.augment.{self.engine_name}_engine")
        self.engine = module.Engine(self.recipes, image_size, channels)
        self.mean = nn.Buffer(torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.std = nn.Buffer(torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def with_recipe(self, **recipe: Any) -> Self:
        """Return an object that makes views of the same images with another recipe.

        Args:
            recipe: arguments of the constructor. ``view_b`` and the fields of the recipe default to the defaults of the
                constructor, all other arguments to the values of this object.
        """
        normalization = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        known = {"image_size": self.image_size, **normalization, **self.limits, "engine": self.engine_name}
        return type(self)(**{**known, **recipe})

    @property
    def compilable(self) -> list[nn.Module]:
        """Modules that make the views on a GPU, of which ``torch.compile`` joins the operations."""
        whole = getattr(self.engine, "whole", None)
        return [] if whole is None else [whole]

    def draw(self, pixels: Tensor, key: Sequence[int] | None = None, sizes: Tensor | None = None) -> Any:
        """Draw the random parameters of the views of a batch, from which :meth:`forward` makes the views of its parts.

        Args:
            pixels: uint8 ``[N, C, H, W]``.
            key: see :meth:`forward`.
            sizes: see :meth:`forward`.

        Returns:
            The argument ``draws`` of :meth:`forward`. The engine "kornia" keeps the views of all N images in it.

        Raises:
            TypeError: if ``pixels`` is not uint8.
            ValueError: if ``pixels`` does not have four dimensions, or has another number of channels.

        Example:
            >>> views = TwoViews(image_size=24, channels=3, mean=[0.5] * 3, std=[0.25] * 3)
            >>> images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
            >>> draws, (whole, _) = views.draw(images, key=(0, 1)), views(images, key=(0, 1))
            >>> view_a, view_b = views(images, draws=draws, part=slice(1, 3))
            >>> view_a.shape, bool((view_a == whole[1:3]).all())
            (torch.Size([2, 3, 24, 24]), True)
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"TwoViews takes uint8 images in [0, 255], not {pixels.dtype}")
        if pixels.ndim != 4 or pixels.shape[1] != self.channels:
            raise ValueError(f"TwoViews was made for [N, {self.channels}, H, W], not {list(pixels.shape)}")
        seed = int(torch.randint(2**63 - 1, ())) if key is None else derive_seed(key)
        return self.engine.draw(pixels, sizes, seed)

    @torch.no_grad()
    def forward(
        self,
        pixels: Tensor,
        key: Sequence[int] | None = None,
        sizes: Tensor | None = None,
        draws: Any = None,
        part: slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """Make both views.

        Args:
            pixels: uint8 ``[N, C, H, W]``.
            key: integers >= 0 that determine the random parameters, such as (seed, batch counter, rank). With a key,
                the state of torch's global generator does not change. None draws from the global generator.
            sizes: int64 ``[N, 2]`` on the CPU, height and width of each image, which lies in the top left corner of its
                canvas ``[C, H, W]``; crops are drawn inside it. None if all images fill the canvas.
            draws: result of :meth:`draw` for the same images, in place of ``key`` and ``sizes``; None to draw.
            part: positions of the M images whose views are made. The views are those that a call for all images makes;
                to the last bit with the engine "fused" on a CPU.

        Returns:
            The first and the second view of each image, fp32 ``[M, C, image_size, image_size]`` each, normalized by
            ``mean`` and ``std``.

        Raises:
            TypeError: if ``pixels`` is not uint8.
            ValueError: if ``pixels`` does not have four dimensions, or has another number of channels.
        """
        draws = self.draw(pixels, key, sizes) if draws is None else draws
        with torch.autocast(pixels.device.type, enabled=False):
            views: tuple[Tensor, Tensor] = self.engine.apply(pixels, draws, self.mean, self.std, part)
        return views


def derive_seed(key: Sequence[int]) -> int:
    """Derive one seed from several integers by a hash, so that similar keys give unrelated random streams.

    Args:
        key: integers >= 0, such as (seed, epoch).

    Returns:
        An integer in [0, 2^63).

    Example:
        >>> derive_seed((0, 1)) == derive_seed((0, 1)), derive_seed((0, 1)) == derive_seed((1, 0))
        (True, False)
    """
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> 1)
