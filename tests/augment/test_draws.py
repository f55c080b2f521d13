"""Distributions of the random parameters against those of torchvision."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torchvision import transforms

from twoview.augment import ViewRecipe
from twoview.augment.draws import Draws

N = 4000


def drawn(sizes=(96, 96), seed=0, **knobs):
    return Draws.of([ViewRecipe(**knobs)], np.tile(sizes, (N, 1)), seed)


@pytest.mark.parametrize("sizes", [(96, 96), (60, 200), (300, 40)])
def test_crop_boxes_are_distributed_as_torchvisions(sizes):
    boxes = drawn(sizes).boxes
    torch.manual_seed(0)
    image = torch.empty(3, *sizes)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(N)], dtype=float
    )
    area_and_ratio = (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3])
    for measure in (*area_and_ratio, *(lambda b, i=i: b[:, i] for i in range(4))):
        assert ks_2samp(measure(boxes), measure(theirs)).pvalue > 1e-3
    assert (boxes >= [0, 0, 1, 1]).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


def test_a_box_that_never_fits_is_the_largest_central_one():
    # Crops of at least the whole area of a strip have no allowed aspect ratio.
    boxes = drawn((20, 200), crop_scale=(1.0, 1.0), crop_ratio=(0.75, 4 / 3)).boxes
    image = torch.empty(3, 20, 200)
    expected = transforms.RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3])
    assert np.unique(boxes, axis=0).tolist() == [list(expected)]
    tiny = drawn((1, 1)).boxes
    assert np.unique(tiny, axis=0).tolist() == [[0, 0, 1, 1]]


def test_jitter_factors_are_distributed_as_torchvisions():
    draws = drawn(jitter=(0.8, 1.4, 0.3, 0.2))
    torch.manual_seed(0)
    theirs = [transforms.ColorJitter.get_params((0.2, 1.8), (0.0, 2.4), (0.7, 1.3), (-0.2, 0.2)) for _ in range(N)]
    for column in range(4):
        assert ks_2samp(draws.factors[:, column], [t[column + 1] for t in theirs]).pvalue > 1e-3


def test_every_view_has_its_own_order_and_all_orders_are_as_likely():
    orders, counts = np.unique(drawn().orders, axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - N / 24) ** 2 / (N / 24)).sum() < 50  # chi-square with 23 degrees of freedom, p = 0.001


def test_the_other_draws():
    draws = drawn(flip_p=0.3, jitter_p=0.6, gray_p=0.1, blur_p=0.4, blur_sigma=(0.5, 1.5), solarize_p=0.25)
    shares = [draws.flips, draws.jittered, draws.grays, draws.sigmas > 0, draws.solarized]
    assert [float(share.mean()) for share in shares] == pytest.approx([0.3, 0.6, 0.1, 0.4, 0.25], abs=0.03)
    sigmas = draws.sigmas[draws.sigmas > 0]
    assert kstest(sigmas, "uniform", args=(0.5, 1.0)).pvalue > 1e-3


def test_jitter_without_strength_is_not_drawn():
    assert not drawn(jitter=(0, 0, 0, 0), jitter_p=1.0).jittered.any()


def test_draws_are_a_function_of_the_seed_and_independent_of_each_other():
    first, again, other = drawn(seed=1), drawn(seed=1), drawn(seed=2)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first.boxes != other.boxes).any()
    values = np.column_stack([first.flips, first.jittered, first.grays, first.sigmas > 0, first.factors, first.boxes])
    correlation = np.corrcoef(values.T.astype(float)) - np.eye(values.shape[1])
    assert abs(correlation[:8]).max() < 0.07


def test_the_views_of_the_first_recipe_come_first():
    recipes = [ViewRecipe(flip_p=1.0), ViewRecipe(flip_p=0.0)]
    draws = Draws.of(recipes, np.tile((32, 32), (10, 1)), 0)
    assert draws.flips.tolist() == [True] * 10 + [False] * 10
