import numpy as np
import pytest
import torch
from kornia import augmentation as K
from scipy.stats import ks_2samp
from torch.testing import assert_close
from torchvision import transforms
from torchvision.transforms import functional as TF

from twoview.augment import TwoViews
from twoview.errors import UserError

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]


def photos(n=6, channels=3, size=40, seed=0):
    return torch.randint(
        0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def two_views(channels=3, **knobs):
    return TwoViews(32, channels, (MEAN * 2)[:channels], (STD * 2)[:channels], **knobs)


def operation(kind, **knobs):
    """The operation of a kind as the recipe builds it, with the draws of its last call in ``_params``."""
    return next(op for op in two_views(**knobs).operations_a if isinstance(op, kind))


def test_shapes_types_and_no_gradient():
    for channels in (1, 3, 4, 6):
        view_a, view_b = two_views(channels)(photos(channels=channels))
        for view in (view_a, view_b):
            assert view.shape == (6, channels, 32, 32)
            assert view.dtype == torch.float32
            assert not view.requires_grad


def test_every_image_and_view_has_its_own_draws():
    image = photos(1).expand(8, -1, -1, -1)
    view_a, view_b = two_views()(image, key=(0, 0, 0))
    views = torch.cat([view_a, view_b])
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + 1e9 * torch.eye(16)
    assert distances.min() > 1


def test_the_same_key_repeats_and_another_does_not():
    augment, pixels = two_views(), photos()
    first, again, other_step, other_rank = (
        augment(pixels, key=k)[0] for k in [(0, 5, 0), (0, 5, 0), (0, 6, 0), (0, 5, 1)]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_step)
    assert not torch.equal(first, other_rank)


def test_a_key_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    two_views()(photos(), key=(0, 1, 2))
    assert torch.equal(torch.rand(3), expected)


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        inside = two_views()(photos(), key=(0, 0, 0))[0]
    assert torch.equal(inside, two_views()(photos(), key=(0, 0, 0))[0])


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
    # torchvision draws again where a box does not fit; Kornia takes the nearest that does after ten such draws, as it.
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
    blur, images = operation(K.RandomGaussianBlur, blur=1.0), torch.rand(8, 3, 32, 32)
    views = blur(images)
    for image, view, sigma in zip(images, views, blur._params["sigma"].tolist(), strict=True):
        assert_close(view, TF.gaussian_blur(image, [3, 3], [sigma, sigma]), atol=1e-5, rtol=0)
    draws = blur.generate_parameters(torch.Size([4000, 3, 8, 8]))["sigma"]
    assert ks_2samp(draws.numpy(), np.random.default_rng(0).uniform(0.1, 2.0, 4000)).statistic < 0.05


def test_greyscale_and_solarise_are_torchvisions():
    images = torch.rand(4, 3, 8, 8)
    gray = operation(K.RandomGrayscale, gray=1.0)(images)
    assert_close(gray, torch.stack([TF.rgb_to_grayscale(i, 3) for i in images]), atol=1e-3, rtol=0)
    solarized = operation(K.RandomSolarize, solarize=1.0)(images)
    assert_close(solarized, torch.stack([TF.solarize(i, 0.5) for i in images]))


@pytest.mark.parametrize(
    ("knob", "kind"),
    [
        ("flip", K.RandomHorizontalFlip),
        ("jitter_p", K.ColorJitter),
        ("gray", K.RandomGrayscale),
        ("blur", K.RandomGaussianBlur),
    ],
)
def test_operations_are_applied_to_the_given_share(knob, kind):
    op, images = operation(kind, **{knob: 0.3}), torch.rand(1, 3, 8, 8).expand(2000, -1, -1, -1)
    changed = (op(images) != images).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(0.3, abs=0.04)


def test_normalisation():
    augment = TwoViews(8, 3, MEAN, STD, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter_p=0, gray=0, blur=0)
    pixels = photos(size=8)
    view_a, view_b = augment(pixels)
    expected = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert_close(view_a, expected)
    assert_close(view_b, expected)


def test_the_second_view_may_differ():
    augment = two_views(solarize=0.0, view_b={"solarize": 1.0})
    assert not any(isinstance(op, K.RandomSolarize) for op in augment.operations_a)
    assert any(isinstance(op, K.RandomSolarize) for op in augment.operations_b)


def test_what_the_images_do_not_bear_is_left_out_and_said_once(caplog):
    caplog.set_level("INFO")
    augment = two_views(channels=4, mirror=False, least_crop=0.3)
    assert "4 channels, not to be mirrored, crops from 0.3" in caplog.text
    assert len(caplog.records) == 1
    assert not any(isinstance(op, K.RandomGrayscale | K.RandomHorizontalFlip) for op in augment.operations_a)
    box = augment.operations_a[0].generate_parameters(torch.Size([500, 4, 100, 100]))["src"].round()
    assert ((box[:, 2] - box[:, 0] + 1).prod(1) / 100**2).min() > 0.28
    caplog.clear()
    two_views()
    assert not caplog.records


@pytest.mark.parametrize(
    "knobs",
    [
        {"flip": 1.5},
        {"blur": -0.1},
        {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 1.2)},
        {"jitter": (0.4, 0.4, 0.4)},
        {"jitter": (0.4, 0.4, 0.4, 0.9)},
        {"interpolation": "nearest"},
        {"view_b": {"blurr": 0.1}},
    ],
)
def test_recipes_that_mean_nothing_are_refused(knobs):
    with pytest.raises(UserError, match=f"augment.{next(iter(knobs))}"):
        two_views(**knobs)


def test_only_uint8_of_the_right_channels():
    with pytest.raises(TypeError, match="uint8"):
        two_views()(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        two_views()(photos(channels=1))
