import pytest
import torch
from kornia import augmentation as K
from torch.testing import assert_close

from twoview.augment import TwoViews, derive_seed
from twoview.errors import UserError

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]
NOTHING = {
    **{"crop_scale": (1, 1), "crop_ratio": (1, 1)},
    **dict.fromkeys(("flip_p", "jitter_p", "gray_p", "blur_p"), 0),
}


def photos(n=6, channels=3, size=40, seed=0):
    return torch.randint(
        0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def two_views(channels=3, **knobs):
    return TwoViews(32, channels, (MEAN * 2)[:channels], (STD * 2)[:channels], **knobs)


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


def test_normalization():
    augment = TwoViews(8, 3, MEAN, STD, **NOTHING)
    pixels = photos(size=8)
    view_a, view_b = augment(pixels)
    expected = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert_close(view_a, expected)
    assert_close(view_b, expected)


def test_the_second_view_may_differ():
    augment = two_views(solarize_p=0.0, view_b={"solarize_p": 1.0})
    assert not any(isinstance(op, K.RandomSolarize) for op in augment.operations_a)
    assert any(isinstance(op, K.RandomSolarize) for op in augment.operations_b)


def test_operations_that_do_not_suit_the_images_are_left_out_and_logged_once(caplog):
    caplog.set_level("DEBUG", "twoview")
    augment = two_views(channels=4, allow_flip=False, min_crop_area=0.3)
    (record,) = caplog.records
    assert "recipe adjusted for these images {'channels': 4, 'allow_flip': False, 'min_crop_area': 0.3}" in caplog.text
    assert all(name in record.getMessage() for name in ("crop_scale", "flip_p", "jitter", "gray_p"))
    assert "blur_p" not in record.getMessage()
    assert not any(isinstance(op, K.RandomGrayscale | K.RandomHorizontalFlip) for op in augment.operations_a)
    box = augment.operations_a[0].generate_parameters(torch.Size([500, 4, 100, 100]))["src"].round()
    assert ((box[:, 2] - box[:, 0] + 1).prod(1) / 100**2).min() > 0.28
    caplog.clear()
    two_views()
    assert not caplog.records


def test_only_uint8_of_the_right_channels():
    with pytest.raises(TypeError, match="uint8"):
        two_views()(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        two_views()(photos(channels=1))


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"flip_p": 1.5}, "augment.flip_p=1.5"),
        ({"view_b": {"blurr": 0.1}}, "augment.view_b: unknown blurr"),
        ({"view_b": {"blur_p": 1.1}}, "augment.blur_p=1.1"),
        ({"min_crop_area": 1.5}, "data.min_crop_area=1.5"),
        ({"min_crop_area": -0.1}, "data.min_crop_area=-0.1"),
    ],
)
def test_impossible_values_are_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        two_views(**knobs)


def test_an_unknown_value_of_the_recipe_is_an_error():
    with pytest.raises(TypeError, match="blurr"):
        two_views(blurr=0.1)


def test_a_recipe_given_as_lists_makes_both_views_in_one_pass():
    lists = {"crop_scale": [0.3, 1.0], "jitter": [0.4, 0.4, 0.2, 0.1], "blur_sigma": [0.1, 1.0]}
    tuples = {name: tuple(values) for name, values in lists.items()}
    pixels = photos()
    expected = two_views(**tuples)(pixels, key=(0, 0))
    for augment in (two_views(**lists), two_views(**tuples, view_b=lists), two_views(**lists, view_b=tuples)):
        assert augment.operations_b is None
        for view, other in zip(augment(pixels, key=(0, 0)), expected, strict=True):
            assert torch.equal(view, other)
    passes = []
    augment = two_views(**lists)
    augment.operations_a.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    augment(pixels)
    assert passes == [12]


def test_another_recipe_for_the_same_images():
    views = two_views(channels=4, allow_flip=False, min_crop_area=0.5, view_b={"solarize_p": 1.0})
    pixels = photos(channels=4)
    plain = views.with_recipe(**NOTHING)
    assert (plain.image_size, plain.channels, plain.limits) == (32, 4, views.limits)
    assert plain.operations_b is None  # view_b is part of the recipe
    assert torch.equal(plain.mean, views.mean)
    assert torch.equal(plain.std, views.std)
    same = TwoViews(
        32, 4, (MEAN * 2)[:4], (STD * 2)[:4], allow_flip=False, min_crop_area=0.5, **{**NOTHING, "flip_p": 0.0}
    )
    for view, other in zip(plain(pixels, key=(1,)), same(pixels, key=(1,)), strict=True):
        assert torch.equal(view, other)
    # The limits hold for every recipe, unless they are given.
    flipped = {**NOTHING, "flip_p": 1.0}
    assert torch.equal(views.with_recipe(**flipped)(pixels)[0], plain(pixels)[0])
    assert torch.equal(views.with_recipe(**flipped, allow_flip=True)(pixels)[0], plain(pixels)[0].flip(3))
    small = views.with_recipe(**{**NOTHING, "crop_scale": (0.1, 0.1)}, min_crop_area=0.0)
    box = small.operations_a[0].generate_parameters(torch.Size([50, 4, 100, 100]))["src"].round()
    assert ((box[:, 2] - box[:, 0] + 1).prod(1) / 100**2).max() < 0.12


def test_another_recipe_of_a_subclass_is_of_that_class():
    class Own(TwoViews):
        pass

    assert isinstance(Own(32, 3, MEAN, STD).with_recipe(blur_p=0.0), Own)


def test_neighboring_keys_have_unrelated_seeds():
    seeds = {derive_seed((a, b)) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed((0,)) != derive_seed((0, 1))
