from dataclasses import FrozenInstanceError, asdict

import pytest

from twoview.augment import ViewRecipe
from twoview.errors import UserError


@pytest.mark.parametrize(
    "knobs",
    [
        {"flip_p": 1.5},
        {"blur_p": -0.1},
        {"solarize_p": 2},
        {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 1.2)},
        {"crop_ratio": (0.0, 1.0)},
        {"blur_sigma": (2.0, 0.1)},
        {"jitter": (0.4, 0.4, 0.4)},
        {"jitter": (0.4, 0.4, 0.4, 0.9)},
        {"jitter": (-0.4, 0.4, 0.4, 0.1)},
        {"interpolation": "nearest"},
    ],
)
def test_impossible_recipes_are_refused(knobs):
    with pytest.raises(UserError, match=f"augment.{next(iter(knobs))}="):
        ViewRecipe(**knobs)


def test_lists_and_tuples_are_the_same_recipe():
    lists = ViewRecipe(crop_scale=[0.2, 1.0], jitter=[0.4, 0.4, 0.2, 0.1], blur_sigma=[0.1, 1.0])
    tuples = ViewRecipe(crop_scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur_sigma=(0.1, 1.0))
    assert lists == tuples
    assert hash(lists) == hash(tuples)
    assert lists.crop_scale == (0.2, 1.0)
    assert lists.interpolation == "bilinear"


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        ViewRecipe().flip_p = 0.1


def test_changes_name_values_of_the_recipe():
    recipe = ViewRecipe(flip_p=0.3)
    changed = recipe.changed({"blur_p": 0.1, "solarize_p": 0.2, "crop_scale": [0.3, 1.0]})
    assert (changed.flip_p, changed.blur_p, changed.solarize_p, changed.crop_scale) == (0.3, 0.1, 0.2, (0.3, 1.0))
    assert recipe.blur_p == 0.5
    assert recipe.changed({}) == recipe
    with pytest.raises(UserError, match=r"augment.view_b: unknown blurr; choose from crop_scale, .*solarize_p"):
        recipe.changed({"blurr": 0.1})
    with pytest.raises(UserError, match=r"augment.blur_p=2: a probability"):
        recipe.changed({"blur_p": 2})


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_without_three_channels_have_no_colors(channels):
    recipe = ViewRecipe().adjusted(channels, allow_flip=True, min_crop_area=0.0)
    assert recipe == ViewRecipe(jitter=(0.8, 0.8, 0.0, 0.0), gray_p=0.0)


def test_limits_of_the_images_are_kept():
    everything = ViewRecipe().adjusted(channels=3, allow_flip=True, min_crop_area=0.0)
    assert everything == ViewRecipe()
    limited = ViewRecipe(crop_scale=(0.1, 0.2)).adjusted(channels=3, allow_flip=False, min_crop_area=0.3)
    assert (limited.crop_scale, limited.flip_p) == ((0.3, 0.3), 0.0)
    assert {**asdict(limited), "crop_scale": 0, "flip_p": 0} == {**asdict(ViewRecipe()), "crop_scale": 0, "flip_p": 0}
    assert ViewRecipe(crop_scale=(0.5, 1.0)).adjusted(3, True, 0.3).crop_scale == (0.5, 1.0)
