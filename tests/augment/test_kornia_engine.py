"""Each operation of Kornia against the same of torchvision."""

import numpy as np
import pytest
import torch
from kornia import augmentation as K
from scipy.stats import ks_2samp
from torch.testing import assert_close
from torchvision import transforms
from torchvision.transforms import functional as TF

from twoview.augment import ViewRecipe
from twoview.augment.kornia_engine import kornia_operations


def operation(kind, **knobs):
    """The operation of a kind as the recipe builds it, with the draws of its last call in ``_params``."""
    return next(op for op in kornia_operations(ViewRecipe(**knobs), 32) if isinstance(op, kind))


def test_crops_are_torchvisions_at_the_same_box():
    crop, images = operation(K.RandomResizedCrop), torch.rand(16, 3, 40, 48)
    views = crop(images)
    for image, view, box in zip(images, views, crop._params["src"].round().long(), strict=True):
        (left, top), (right, bottom) = box[0].tolist(), box[2].tolist()
        expected = TF.resized_crop(image, top, left, bottom - top + 1, right - left + 1, [32, 32], antialias=False)
        assert_close(view, expected)


def test_crop_boxes_are_distributed_as_torchvisions():
    n, size = 4000, 96
    params = operation(K.RandomResizedCrop).generate_parameters(torch.Size([n, 3, size, size]))
    box = params["src"].round()
    width, height = (box[:, 2] - box[:, 0] + 1).unbind(1)
    theirs = [
        transforms.RandomResizedCrop.get_params(torch.empty(3, size, size), [0.08, 1.0], [3 / 4, 4 / 3])
        for _ in range(n)
    ]
    _, _, h, w = (np.array(x, dtype=float) for x in zip(*theirs, strict=True))
    # Both draw again where a box does not fit, and take the nearest that fits after ten draws.
    assert ks_2samp((width * height).numpy(), w * h).statistic < 0.05
    assert ks_2samp((width / height).numpy(), w / h).statistic < 0.05


def test_jitter_is_torchvisions_at_the_same_factors():
    jitter, images = operation(K.ColorJitter, jitter_p=1.0), torch.rand(12, 3, 16, 16)
    views = jitter(images)
    p = jitter._params
    for i, image in enumerate(images):
        for step in p["order"].tolist():
            image = [
                lambda x: TF.adjust_brightness(x, float(p["brightness_factor"][i])),  # noqa: B023
                lambda x: TF.adjust_contrast(x, float(p["contrast_factor"][i])),  # noqa: B023
                lambda x: TF.adjust_saturation(x, float(p["saturation_factor"][i])),  # noqa: B023
                lambda x: TF.adjust_hue(x, float(p["hue_factor"][i])),  # noqa: B023
            ][step](image)
        assert_close(views[i], image, atol=2e-3, rtol=0)


def test_jitter_factors_are_distributed_as_torchvisions():
    params = operation(K.ColorJitter).generate_parameters(torch.Size([4000, 3, 8, 8]))
    theirs = [transforms.ColorJitter.get_params((0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2)) for _ in range(4000)]
    for name, column in (("brightness", 1), ("contrast", 2), ("saturation", 3), ("hue", 4)):
        assert ks_2samp(params[f"{name}_factor"].numpy(), [t[column] for t in theirs]).statistic < 0.05, name


def test_blur_is_torchvisions_at_the_same_deviation():
    blur, images = operation(K.RandomGaussianBlur, blur_p=1.0), torch.rand(8, 3, 32, 32)
    views = blur(images)
    for image, view, sigma in zip(images, views, blur._params["sigma"].tolist(), strict=True):
        assert_close(view, TF.gaussian_blur(image, [3, 3], [sigma, sigma]), atol=1e-5, rtol=0)
    draws = blur.generate_parameters(torch.Size([4000, 3, 8, 8]))["sigma"]
    assert ks_2samp(draws.numpy(), np.random.default_rng(0).uniform(0.1, 2.0, 4000)).statistic < 0.05


def test_grayscale_and_solarize_are_torchvisions():
    images = torch.rand(4, 3, 8, 8)
    gray = operation(K.RandomGrayscale, gray_p=1.0)(images)
    assert_close(gray, torch.stack([TF.rgb_to_grayscale(i, 3) for i in images]), atol=1e-3, rtol=0)
    solarized = operation(K.RandomSolarize, solarize_p=1.0)(images)
    assert_close(solarized, torch.stack([TF.solarize(i, 0.5) for i in images]))


@pytest.mark.parametrize(
    ("knob", "kind"),
    [
        ("flip_p", K.RandomHorizontalFlip),
        ("jitter_p", K.ColorJitter),
        ("gray_p", K.RandomGrayscale),
        ("blur_p", K.RandomGaussianBlur),
    ],
)
def test_operations_are_applied_to_the_given_share(knob, kind):
    op, images = operation(kind, **{knob: 0.3}), torch.rand(1, 3, 8, 8).expand(2000, -1, -1, -1)
    changed = (op(images) != images).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(0.3, abs=0.04)


def test_operations_that_would_do_nothing_are_left_out():
    kinds = [type(op) for op in kornia_operations(ViewRecipe(), 32)]
    assert kinds == [
        K.RandomResizedCrop,
        K.RandomHorizontalFlip,
        K.ColorJitter,
        K.RandomGrayscale,
        K.RandomGaussianBlur,
    ]
    nothing = dict.fromkeys(("flip_p", "jitter_p", "gray_p", "blur_p", "solarize_p"), 0.0)
    assert [type(op) for op in kornia_operations(ViewRecipe(**nothing), 32)] == [K.RandomResizedCrop]
    no_strength = ViewRecipe(**{**nothing, "jitter_p": 1.0}, jitter=(0, 0, 0, 0))
    assert [type(op) for op in kornia_operations(no_strength, 32)] == [K.RandomResizedCrop]


@pytest.mark.parametrize(("size", "kernel"), [(16, 3), (32, 3), (96, 9), (224, 23)])
def test_the_kernel_of_the_blur_is_a_tenth_of_the_view(size, kernel):
    blur = next(op for op in kornia_operations(ViewRecipe(), size) if isinstance(op, K.RandomGaussianBlur))
    assert blur.flags["kernel_size"] == (kernel, kernel)
