import pytest
import torch
from torch.testing import assert_close

from twoview.augment import TwoViews, derive_seed
from twoview.errors import UserError

ENGINES = pytest.mark.parametrize("engine", ["fused", "fast", "kornia"])
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


@ENGINES
def test_shapes_types_and_no_gradient(engine):
    for channels in (1, 3, 4, 6):
        view_a, view_b = two_views(channels, engine=engine)(photos(channels=channels))
        for view in (view_a, view_b):
            assert view.shape == (6, channels, 32, 32)
            assert view.dtype == torch.float32
            assert not view.requires_grad


@ENGINES
def test_every_image_and_view_has_its_own_draws(engine):
    image = photos(1).expand(8, -1, -1, -1)
    view_a, view_b = two_views(engine=engine)(image, key=(0, 0, 0))
    views = torch.cat([view_a, view_b])
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + 1e9 * torch.eye(16)
    assert distances.min() > 1


@ENGINES
def test_the_same_key_repeats_and_another_does_not(engine):
    augment, pixels = two_views(engine=engine), photos()
    first, again, other_step, other_rank = (
        augment(pixels, key=k)[0] for k in [(0, 5, 0), (0, 5, 0), (0, 6, 0), (0, 5, 1)]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_step)
    assert not torch.equal(first, other_rank)


@ENGINES
def test_without_a_key_the_global_generator_draws(engine):
    augment, pixels = two_views(engine=engine), photos()
    torch.manual_seed(1)
    first, second = augment(pixels)[0], augment(pixels)[0]
    torch.manual_seed(1)
    assert torch.equal(augment(pixels)[0], first)
    assert not torch.equal(first, second)


@ENGINES
def test_a_key_leaves_the_global_generator_alone(engine):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    two_views(engine=engine)(photos(), key=(0, 1, 2))
    assert torch.equal(torch.rand(3), expected)


@ENGINES
def test_autocast_changes_nothing(engine):
    augment = two_views(engine=engine)
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment(photos(), key=(0, 0, 0))[0]
    assert torch.equal(inside, augment(photos(), key=(0, 0, 0))[0])


@ENGINES
def test_normalization(engine):
    augment = TwoViews(8, 3, MEAN, STD, **NOTHING, engine=engine)
    pixels = photos(size=8)
    view_a, view_b = augment(pixels)
    expected = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert_close(view_a, expected)
    assert_close(view_b, expected)


@ENGINES
def test_the_second_view_may_differ(engine):
    augment, dark = two_views(**NOTHING, view_b={"solarize_p": 1.0}, engine=engine), photos() // 4
    view_a, view_b = augment(dark, key=(0,))
    assert torch.equal(view_a, view_b)  # solarization inverts values above one half
    bright = (photos() // 4) + 180
    view_a, view_b = augment(bright, key=(0,))
    assert (view_a > view_b).all()


def test_operations_that_do_not_suit_the_images_are_left_out_and_logged_once(caplog):
    caplog.set_level("DEBUG", "twoview")
    augment = two_views(channels=4, allow_flip=False, min_crop_area=0.3)
    (record,) = caplog.records
    assert "recipe adjusted for these images {'channels': 4, 'allow_flip': False, 'min_crop_area': 0.3}" in caplog.text
    assert all(name in record.getMessage() for name in ("crop_scale", "flip_p", "jitter", "gray_p"))
    assert "blur_p" not in record.getMessage()
    for recipe in augment.recipes:
        assert (recipe.gray_p, recipe.flip_p, recipe.crop_scale) == (0, 0, (0.3, 1.0))
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
        ({"engine": "cuda"}, "augment.engine=cuda: choose one of auto, fused, fast, kornia"),
        ({"engine": "kornia", "antialias": True}, "augment.antialias=true"),
        ({"antialias": "yes"}, "augment.antialias=yes"),
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
    expected = two_views(**tuples, engine="kornia")(pixels, key=(0, 0))
    for knobs in (lists, {**tuples, "view_b": lists}, {**lists, "view_b": tuples}):
        augment = two_views(**knobs, engine="kornia")
        for view, other in zip(augment(pixels, key=(0, 0)), expected, strict=True):
            assert torch.equal(view, other)
    passes = []
    augment.engine.operations[0].register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    augment(pixels)
    assert passes == [12]


def test_another_recipe_for_the_same_images():
    views = two_views(channels=4, allow_flip=False, min_crop_area=0.5, view_b={"solarize_p": 1.0})
    pixels = photos(channels=4)
    plain = views.with_recipe(**NOTHING)
    assert (plain.image_size, plain.channels, plain.limits) == (32, 4, views.limits)
    assert plain.recipes[0] == plain.recipes[1]  # view_b is part of the recipe
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
    assert_close(views.with_recipe(**flipped, allow_flip=True)(pixels)[0], plain(pixels)[0].flip(3))
    small = views.with_recipe(**{**NOTHING, "crop_scale": (0.1, 0.1)}, min_crop_area=0.0)
    assert small.recipes[0].crop_scale == (0.1, 0.1)
    assert two_views(engine="fast").with_recipe().engine_name == "fast"


def test_another_recipe_of_a_subclass_is_of_that_class():
    class Own(TwoViews):
        pass

    assert isinstance(Own(32, 3, MEAN, STD).with_recipe(blur_p=0.0), Own)


def test_neighboring_keys_have_unrelated_seeds():
    seeds = {derive_seed((a, b)) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed((0,)) != derive_seed((0, 1))


@ENGINES
def test_parts_of_a_batch_have_the_views_of_the_whole_batch(engine):
    augment, pixels = two_views(engine=engine), photos(9)
    whole, draws = augment(pixels, key=(1, 2)), augment.draw(pixels, key=(1, 2))
    state = torch.get_rng_state()
    for part in (slice(0, 4), slice(4, 7), slice(7, 9), slice(0, 4)):
        for view, expected in zip(augment(pixels, draws=draws, part=part), whole, strict=True):
            assert_close(view, expected[part], atol=1e-6, rtol=0)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match="uint8"):
        augment.draw(pixels.float())


def test_kornia_makes_the_views_of_a_batch_once():
    augment, pixels, passes = two_views(engine="kornia"), photos(9), []
    augment.engine.operations[0].register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    draws = augment.draw(pixels, key=(1, 2))
    assert not passes
    for part in (slice(0, 5), slice(5, 9), slice(0, 5)):
        augment(pixels, draws=draws, part=part)
    assert passes == [18]
