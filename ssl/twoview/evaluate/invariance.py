"""What features ignore: images and their augmented selves, one operation at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twoview.augment import TwoViews
from twoview.data import Images, in_order
from twoview.evaluate.features import evaluating
from twoview.evaluate.structure import mean_similarity

NOTHING: Mapping[str, Any] = {
    "crop_scale": (1, 1),
    "crop_ratio": (1, 1),
    "jitter": (0, 0, 0, 0),
    **dict.fromkeys(("flip", "jitter_p", "gray", "blur", "solarize"), 0.0),
}
# Strengths from weak to strong; an operation that is done or not has one.
SHIFTS: Mapping[str, tuple[Sequence[float], Callable[[float], dict[str, Any]]]] = {
    "crop to area": ((0.75, 0.5, 0.25), lambda x: {"crop_scale": (x, x)}),
    "mirror": ((1.0,), lambda x: {"flip": x}),
    "brightness": ((0.2, 0.4, 0.8), lambda x: {"jitter": (x, 0, 0, 0), "jitter_p": 1.0}),
    "contrast": ((0.2, 0.4, 0.8), lambda x: {"jitter": (0, x, 0, 0), "jitter_p": 1.0}),
    "saturation": ((0.2, 0.4, 0.8), lambda x: {"jitter": (0, 0, x, 0), "jitter_p": 1.0}),
    "hue": ((0.05, 0.1, 0.2), lambda x: {"jitter": (0, 0, 0, x), "jitter_p": 1.0}),
    "greyscale": ((1.0,), lambda x: {"gray": x}),
    "blur of sigma": ((0.5, 1.0, 2.0), lambda x: {"blur": 1.0, "blur_sigma": (x, x)}),
    "solarise": ((1.0,), lambda x: {"solarize": x}),
}
NEED_COLOUR = ("saturation", "hue", "greyscale")


def augmented(
    backbone: nn.Module,
    images: Images,
    views: TwoViews,
    device: torch.device,
    batch_size: int,
    seed: int,
    count: int = 2,
) -> list[Tensor]:
    """Features of two views of each image, or of the first alone.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``.
        images: N of them.
        views: how they are augmented.
        device: where to compute.
        batch_size: images at a time.
        seed: of the views.
        count: 2, or 1.

    Returns:
        fp32 ``[N, F]`` for each view.
    """
    views.to(device)
    # What probes see is the centre of what is stored.
    parts, side = [], min(views.image_size, images.size)
    top = (images.size - side) // 2
    with evaluating(backbone, device) as features_of:
        for number, batch in enumerate(in_order(images, batch_size)):
            both = views(batch.pixels[..., top : top + side, top : top + side].to(device), key=(seed, number))
            parts.append([features_of(view) for view in both[:count]])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def invariance(
    backbone: nn.Module,
    images: Images,
    limits: Mapping[str, Any],
    device: torch.device,
    batch_size: int,
    seed: int,
    classify: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """How much of an image's features survives each operation of the augmentation, and of its class.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``.
        images: labelled test images, at least two.
        limits: what :class:`twoview.augment.TwoViews` must know: image_size, channels, mean, std.
        device: where to compute.
        batch_size: images at a time.
        seed: of the draws.
        classify: ``[N, F] -> int64 [N]``, a probe that was fitted to clean images; None for no accuracies.

    Returns:
        ``different_images``, the mean cosine of different images; ``accuracy`` without any operation; and ``shifts``:
        for each operation and strength the mean ``cosine`` of an image with its augmented self, ``invariance``, where
        that lies between different images (0) and no change (1), and ``accuracy``.
    """

    def features_of(recipe: Mapping[str, Any]) -> Tensor:
        views = TwoViews(**limits, **{**NOTHING, **recipe})
        return augmented(backbone, images, views, device, batch_size, seed, count=1)[0]

    def accuracy(features: Tensor) -> float | None:
        return None if classify is None else float((classify(features) == images.labels).double().mean())

    clean = features_of({})
    different = mean_similarity(clean)
    shifts = []
    for name, (strengths, recipe) in SHIFTS.items():
        if name in NEED_COLOUR and limits["channels"] != 3:
            continue
        for strength in strengths:
            features = features_of(recipe(strength))
            cosine = float(F.cosine_similarity(clean, features).mean())
            shifts.append(
                {
                    "operation": name,
                    "strength": strength,
                    "cosine": cosine,
                    "invariance": (cosine - different) / (1 - different) if different < 1 - 1e-6 else None,
                    "accuracy": accuracy(features),
                }
            )
    return {"different_images": different, "accuracy": accuracy(clean), "shifts": shifts}
