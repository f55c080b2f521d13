"""Two augmented views of every image, in batches on the device of the images, with Kornia."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from kornia import augmentation as K
from torch import Tensor, nn

from twoview.errors import UserError

log = logging.getLogger(__name__)


class TwoViews(nn.Module):
    """Two random views of each image of a batch, with draws of their own for every image and view.

    The operations, in the order of SimCLR (arXiv:2002.05709, appendix A): random resized crop, flip, colour jitter,
    greyscale, blur, solarise (BYOL, arXiv:2006.07733, appendix B), normalise. Each equals torchvision's at the same
    parameters; the crop has no antialias. The order of the four jitter operations is drawn once a batch (Kornia),
    all else for each image. Operations that need three channels are left out for other images, which is said once.

    Args:
        image_size: height and width of the views in pixels.
        channels: C of the images.
        mean: C means of the images, in [0, 1].
        std: C deviations of the images, > 0, on the same scale.
        crop_scale: least and greatest area of a crop as a share of the image, in (0, 1].
        crop_ratio: least and greatest width over height of a crop.
        interpolation: of the crop, "bilinear" or "bicubic".
        flip: probability of a horizontal flip.
        jitter: greatest change of brightness, contrast, saturation (factors 1 - x to 1 + x) and hue (turns, up to 0.5).
        jitter_p: probability of colour jitter.
        gray: probability of greyscale.
        blur: probability of a Gaussian blur with a kernel of a tenth of the image (odd, at least 3).
        blur_sigma: least and greatest deviation of the blur in pixels.
        solarize: probability of inverting all values above one half.
        view_b: what differs for the second view, such as ``{"blur": 0.1, "solarize": 0.2}``; empty for equal recipes.
        mirror: whether these images bear to be mirrored; if not, flips are left out, which is said once.
        least_crop: share of the area below which a crop says too little of these images; the recipe is cut to it.

    Raises:
        UserError: a value out of range, or an unknown key in ``view_b``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image_size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        crop_scale: Sequence[float] = (0.08, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        flip: float = 0.5,
        jitter: Sequence[float] = (0.8, 0.8, 0.8, 0.2),
        jitter_p: float = 0.8,
        gray: float = 0.2,
        blur: float = 0.5,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        solarize: float = 0.0,
        view_b: Mapping[str, Any] | None = None,
        mirror: bool = True,
        least_crop: float = 0.0,
    ) -> None:
        super().__init__()
        recipe: dict[str, Any] = {
            "crop_scale": list(crop_scale),
            "crop_ratio": crop_ratio,
            "interpolation": interpolation,
            "flip": flip,
            "jitter": list(jitter),
            "jitter_p": jitter_p,
            "gray": gray,
            "blur": blur,
            "blur_sigma": blur_sigma,
            "solarize": solarize,
        }
        given, other = dict(recipe), {**recipe, **(view_b or {})}
        if unknown := other.keys() - recipe.keys():
            raise UserError(f"augment.view_b: unknown {', '.join(sorted(unknown))}; choose from {', '.join(recipe)}")
        for view in (recipe, other):
            _check(view)
            view |= _borne(view, channels, mirror, least_crop)
        if left_out := [knob for knob in recipe if recipe[knob] != given[knob]]:
            log.info(
                "augment: these images (%d channels%s%s) do not bear the whole recipe; changed: %s",
                channels,
                "" if mirror else ", not to be mirrored",
                f", crops from {least_crop:g} of the area" if least_crop else "",
                ", ".join(f"{knob} to {recipe[knob]}" for knob in left_out),
            )
        self.image_size, self.channels = image_size, channels
        self.operations_a = _operations(recipe, image_size)
        self.operations_b = None if other == recipe else _operations(other, image_size)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, pixels: Tensor, key: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Make both views.

        Args:
            pixels: uint8 ``[N, C, H, W]``.
            key: integers >= 0 that fix the draws, such as (seed, batch counter, rank); None draws from torch's
                global generator. With a key, that generator is left as it was.

        Returns:
            Two fp32 ``[N, C, image_size, image_size]``, normalised.

        Raises:
            TypeError: pixels that are not uint8.
            ValueError: another number of channels.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"TwoViews takes uint8 images in [0, 255], not {pixels.dtype}")
        if pixels.ndim != 4 or pixels.shape[1] != self.channels:
            raise ValueError(f"TwoViews was made for [N, {self.channels}, H, W], not {list(pixels.shape)}")
        device = pixels.device
        devices = [device] if device.type != "cpu" else []
        with (
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng(devices, enabled=key is not None, device_type=device.type if devices else "cuda"),
        ):
            if key is not None:
                # A hash of the integers, so that neighbouring seeds, counters and ranks share no stream.
                torch.manual_seed(mixed(key))
            images = pixels.float().div_(255)
            if self.operations_b is None:
                view_a, view_b = self._normalized(self.operations_a(torch.cat([images, images]))).chunk(2)
            else:
                view_a = self._normalized(self.operations_a(images))
                view_b = self._normalized(self.operations_b(images))
        return view_a, view_b

    def _normalized(self, images: Tensor) -> Tensor:
        return images.sub(self.mean).div_(self.std)


def _borne(recipe: Mapping[str, Any], channels: int, mirror: bool, least_crop: float) -> dict[str, Any]:
    """The recipe cut to what the images bear: saturation, hue and greyscale need three channels."""
    low, high = recipe["crop_scale"]
    borne = {**recipe, "crop_scale": [max(low, least_crop), max(high, least_crop)], "jitter": list(recipe["jitter"])}
    if channels != 3:
        borne |= {"jitter": [*recipe["jitter"][:2], 0.0, 0.0], "gray": 0.0}
    return borne if mirror else borne | {"flip": 0.0}


def _operations(recipe: Mapping[str, Any], image_size: int) -> nn.Sequential:
    brightness, contrast, saturation, hue = recipe["jitter"]
    kernel = max(3, image_size // 10 | 1)
    operations: list[nn.Module] = [
        # "slice" equals torchvision.transforms.functional.resized_crop without antialias to the last bit.
        K.RandomResizedCrop(
            (image_size, image_size),
            tuple(recipe["crop_scale"]),
            tuple(recipe["crop_ratio"]),
            resample=recipe["interpolation"],
            align_corners=False,
            cropping_mode="slice",
        )
    ]
    if recipe["flip"]:
        operations.append(K.RandomHorizontalFlip(p=recipe["flip"]))
    if recipe["jitter_p"] and (brightness or contrast or saturation or hue):
        operations.append(K.ColorJitter(brightness, contrast, saturation, hue, p=recipe["jitter_p"]))
    if recipe["gray"]:
        operations.append(K.RandomGrayscale(p=recipe["gray"]))
    if recipe["blur"]:
        operations.append(K.RandomGaussianBlur((kernel, kernel), tuple(recipe["blur_sigma"]), p=recipe["blur"]))
    if recipe["solarize"]:
        operations.append(K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=recipe["solarize"]))
    return nn.Sequential(*operations)


def _check(recipe: Mapping[str, Any]) -> None:
    for knob in ("flip", "jitter_p", "gray", "blur", "solarize"):
        if not 0 <= recipe[knob] <= 1:
            raise UserError(f"augment.{knob}={recipe[knob]}: a probability lies between 0 and 1")
    for knob, least, greatest in (("crop_scale", 0, 1), ("crop_ratio", 0, np.inf), ("blur_sigma", 0, np.inf)):
        low, high = recipe[knob]
        if not least < low <= high <= greatest:
            raise UserError(
                f"augment.{knob}={list(recipe[knob])}: give [least, greatest] above {least} up to {greatest}"
            )
    if len(recipe["jitter"]) != 4 or not all(x >= 0 for x in recipe["jitter"]) or recipe["jitter"][3] > 0.5:
        raise UserError(
            f"augment.jitter={list(recipe['jitter'])}: give brightness, contrast, saturation (>= 0), hue (0 to 0.5)"
        )
    if recipe["interpolation"] not in ("bilinear", "bicubic"):
        raise UserError(f"augment.interpolation={recipe['interpolation']}: choose bilinear or bicubic")


def mixed(key: Sequence[int]) -> int:
    """One seed of several integers >= 0, different where they are."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> 1)
