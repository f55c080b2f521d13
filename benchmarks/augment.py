"""Views per second of the engines of twoview beside stock Kornia and torchvision; prints a Markdown table.

    python benchmarks/augment.py                      # all settings, 7 repeats; a few minutes on two cores
    python benchmarks/augment.py --only "32 px" --repeats 3 --json table.json

Each repeat makes both views of a batch of uint8 images: crop, flip, jitter, grayscale, blur where the setting has it,
and normalization. "stock Kornia" is ``AugmentationSequential`` on the float batch, once for each view. torchvision's
transforms are applied image by image, as its documentation does: version 1 to PIL images, version 2 to uint8 tensors.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from kornia import augmentation as K
from side_by_side import begin, rates, save
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import functional as TF, v2

from twoview.augment import TwoViews, ViewRecipe
from twoview.augment.recipe import blur_kernel

SMALL = {"jitter": [0.4, 0.4, 0.4, 0.1], "blur_p": 0.0}
DIGITS = {"crop_scale": [0.3, 1.0], "flip_p": 0.0, "jitter": [0.4, 0.4, 0.0, 0.0], "gray_p": 0.0, "blur_p": 0.0}
# Name, size of the views, size of the images, channels, batch size, recipe.
SETTINGS: list[tuple[str, int, int, int, int, dict[str, Any]]] = [
    ("32 px, batch 256, no blur", 32, 32, 3, 256, SMALL),
    ("32 px, batch 256, blur", 32, 32, 3, 256, {}),
    ("32 px, batch 256, 1 channel, digits", 32, 32, 1, 256, DIGITS),
    ("96 px, batch 128, blur", 96, 110, 3, 128, {}),
    ("224 px, batch 32, no blur", 224, 256, 3, 32, SMALL),
    ("224 px, batch 32, blur", 224, 256, 3, 32, {}),
]
Call = Callable[[], Any]


def stock_kornia(recipe: ViewRecipe, size: int, channels: int) -> nn.Module:
    operations: list[nn.Module] = [K.RandomResizedCrop((size, size), tuple(recipe.crop_scale))]
    if recipe.flip_p:
        operations.append(K.RandomHorizontalFlip(p=recipe.flip_p))
    operations.append(K.ColorJitter(*recipe.jitter, p=recipe.jitter_p))
    if recipe.gray_p:
        operations.append(K.RandomGrayscale(p=recipe.gray_p))
    if recipe.blur_p:
        kernel = blur_kernel(size)
        operations.append(K.RandomGaussianBlur((kernel, kernel), tuple(recipe.blur_sigma), p=recipe.blur_p))
    operations.append(K.Normalize(torch.full((channels,), 0.5), torch.full((channels,), 0.25)))
    return K.AugmentationSequential(*operations)


def torchvision_transform(recipe: ViewRecipe, size: int, channels: int, kind: Any) -> Any:
    """Transform of torchvision, version 1 for PIL images or version 2 for tensors; ``kind`` is the module."""
    blur = kind.GaussianBlur(blur_kernel(size), tuple(recipe.blur_sigma))
    to_float = [kind.ToTensor()] if kind is v1 else [kind.ToDtype(torch.float32, scale=True)]
    steps = [
        kind.RandomResizedCrop(size, tuple(recipe.crop_scale)),
        kind.RandomHorizontalFlip(recipe.flip_p),
        kind.RandomApply([kind.ColorJitter(*recipe.jitter)], p=recipe.jitter_p),
        *([kind.RandomGrayscale(recipe.gray_p)] if recipe.gray_p else []),
        *([kind.RandomApply([blur], p=recipe.blur_p)] if recipe.blur_p else []),
        *to_float,
        kind.Normalize([0.5] * channels, [0.25] * channels),
    ]
    return kind.Compose(steps)


def cases(
    size: int, source: int, channels: int, batch: int, knobs: dict[str, Any], device: str = "cpu", others: bool = True
) -> dict[str, Call]:
    """Functions that make both views of a batch; ``others`` adds torchvision, image by image on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, channels, source, source), dtype=torch.uint8, generator=generator).to(device)
    recipe = ViewRecipe(**knobs).adjusted(channels=channels, allow_flip=True, min_crop_area=0.0)

    def ours(engine: str, compiled: bool = False) -> Call:
        augment = TwoViews(size, channels, [0.5] * channels, [0.25] * channels, engine=engine, **knobs).to(device)
        for module in augment.compilable if compiled else ():
            module.compile()
        counter = iter(range(10**9))
        return lambda: augment(images, key=(0, next(counter)))

    found = {f"twoview {engine}": ours(engine) for engine in ("fast", "fused", "kornia")}
    if device != "cpu":
        found = {"twoview fused, compiled": ours("fused", compiled=True)} | found
    if others:
        of_pil, of_tensor = (torchvision_transform(recipe, size, channels, kind) for kind in (v1, v2))
        pictures = [TF.to_pil_image(image.cpu()) for image in images]
        found["torchvision v1, PIL images"] = lambda: [of_pil(picture) for _ in range(2) for picture in pictures]
        found["torchvision v2, tensors"] = lambda: [of_tensor(image) for _ in range(2) for image in images]
    kornia = stock_kornia(recipe, size, channels).to(device)
    return {**found, "stock Kornia": lambda: [kornia(images.float() / 255) for _ in range(2)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for the table as JSON")
    given = parser.parse_args()
    provenance, rows = begin("Views per second of augmentation", "views/s"), []
    for name, size, source, channels, batch, knobs in SETTINGS:
        if given.only in name:
            made = cases(size, source, channels, batch, knobs, given.device, others=given.device == "cpu")
            rows += rates(name, made, 2 * batch, given.repeats)
    save(given.json, provenance, rows)


if __name__ == "__main__":
    main()
