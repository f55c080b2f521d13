"""Parameters of the random operations of a view, independent of the library that implements the operations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from twoview.errors import require, require_choice

_PROBABILITIES = ("flip_p", "jitter_p", "gray_p", "blur_p", "solarize_p")


@dataclass(frozen=True)
class ViewRecipe:
    """Parameters of the random operations of one view, in the order in which they are applied.

    The defaults are those of SimCLR (Chen et al. 2020, arXiv:2002.05709, appendix A) at color strength 1.

    Differs from the papers' code: by default crops are resized bilinearly and without antialiasing, while SimCLR and
    BYOL use bicubic and MoCo antialiased bilinear interpolation; color jitter precedes grayscale in MoCo v1 too.

    Args:
        crop_scale: smallest and largest area of a crop as a share of the image, in (0, 1].
        crop_ratio: smallest and largest aspect ratio (width / height) of a crop, > 0.
        interpolation: interpolation of the resized crop, "bilinear" or "bicubic".
        antialias: whether a crop that is larger than the view is averaged over the pixels that it covers, as Pillow
            does.
        flip_p: probability of a horizontal flip, in [0, 1].
        jitter: strengths of brightness, contrast, saturation and hue, >= 0. For a strength x, the factors of
            brightness, contrast and saturation are drawn from [1 - x, 1 + x]. The shift of the hue is drawn from
            [-x, x] turns of the color circle, with x <= 0.5.
        jitter_p: probability of color jitter, in [0, 1].
        gray_p: probability of grayscale conversion, in [0, 1].
        blur_p: probability of a Gaussian blur, in [0, 1]. The kernel size is a tenth of the view size, made odd, and at
            least 3 pixels.
        blur_sigma: smallest and largest standard deviation of the blur in pixels, > 0.
        solarize_p: probability of solarization, in [0, 1]. Solarization inverts all values above one half (BYOL,
            arXiv:2006.07733, appendix B).

    Raises:
        UserError: if a value is out of range.

    Example:
        >>> ViewRecipe(blur_p=0.0).adjusted(channels=1, allow_flip=True, min_crop_area=0.3).jitter
        (0.8, 0.8, 0.0, 0.0)
    """

    crop_scale: Sequence[float] = (0.08, 1.0)
    crop_ratio: Sequence[float] = (0.75, 1.3333333333333333)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = False
    flip_p: float = 0.5
    jitter: Sequence[float] = (0.8, 0.8, 0.8, 0.2)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: Sequence[float] = (0.1, 2.0)
    solarize_p: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):  # lists become tuples, so that recipes with equal values are equal
            if isinstance(value := getattr(self, field.name), Sequence) and not isinstance(value, str):
                object.__setattr__(self, field.name, tuple(value))
        for knob in _PROBABILITIES:
            value = getattr(self, knob)
            possible = isinstance(value, int | float) and 0 <= value <= 1
            require(possible, f"augment.{knob}={value}: a probability lies between 0 and 1")
        for knob, upper in (("crop_scale", 1), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            limits = getattr(self, knob)
            possible = _are_numbers(limits, 2) and 0 < limits[0] <= limits[1] <= upper
            require(possible, f"augment.{knob}={_shown(limits)}: give [smallest, largest] above 0 up to {upper}")
        jitter: Any = self.jitter
        possible = _are_numbers(jitter, 4) and all(x >= 0 for x in jitter) and jitter[3] <= 0.5
        require(
            possible, f"augment.jitter={_shown(jitter)}: give brightness, contrast, saturation (>= 0), hue (0 to 0.5)"
        )
        require_choice("augment", ("bilinear", "bicubic"), interpolation=self.interpolation)
        require(isinstance(self.antialias, bool), f"augment.antialias={self.antialias}: give true or false")

    def adjusted(self, channels: int, allow_flip: bool, min_crop_area: float) -> Self:
        """Return a copy without the operations that do not suit the images.

        Args:
            channels: number of channels C of the images; saturation, hue and grayscale need three channels.
            allow_flip: whether horizontal flips preserve the meaning of the images.
            min_crop_area: smallest share of the area of an image that a crop may have, in [0, 1].
        """
        low, high = self.crop_scale
        changes: dict[str, Any] = {"crop_scale": (max(low, min_crop_area), max(high, min_crop_area))}
        if channels != 3:
            changes |= {"jitter": (*self.jitter[:2], 0.0, 0.0), "gray_p": 0.0}
        if not allow_flip:
            changes["flip_p"] = 0.0
        return replace(self, **changes)

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with some values replaced; ``augment.view_b`` is applied in this way.

        Args:
            changes: new values by name of the field.

        Raises:
            UserError: if a name is unknown, or a value is out of range.
        """
        names = [field.name for field in fields(self)]
        unknown = ", ".join(sorted(changes.keys() - set(names)))
        require(not unknown, f"augment.view_b: unknown {unknown}; choose from {', '.join(names)}")
        return replace(self, **changes)


def blur_kernel(image_size: int) -> int:
    """Size of the kernel of the blur in pixels: a tenth of the size of the view, made odd, and at least 3."""
    return max(3, image_size // 10 | 1)


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, tuple) and len(values) == count and all(isinstance(x, int | float) for x in values)


def _shown(values: Any) -> Any:
    return list(values) if isinstance(values, tuple) else values
