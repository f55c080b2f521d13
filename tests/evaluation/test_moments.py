"""Moments of features and pixels against numpy in float64."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from twoview.evaluation.moments import COLUMNS, EXACT_ROWS, feature_moments, pixel_moments


def assert_moments(found, rows):
    centered = rows - rows.mean(0)
    products = centered.T @ centered if len(rows) >= rows.shape[1] else centered @ centered.T
    assert found.rows == len(rows)
    for value, expected in ((found.mean, rows.mean(0)), (found.variance, rows.var(0)), (found.products, products)):
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [50, 5])  # more rows than columns, and fewer
def test_moments_of_features(n):
    # A mean far from zero: in fp32, sums of products that are not centered would lose the variance.
    rows = 1000 + torch.randn(n, 12, generator=torch.Generator().manual_seed(0))
    found = feature_moments(rows)
    assert_moments(found, rows.double().numpy())
    if n > 12:
        np.testing.assert_allclose(found.gram(), rows.double().T @ rows.double(), rtol=1e-12)


def test_moments_of_pixels_are_exact_over_several_blocks():
    shape = EXACT_ROWS + 300, COLUMNS + 20
    rows = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows[:, 0], rows[:, 1], rows[:, 2] = 7, 0, 255  # constant; the largest products
    found = pixel_moments(rows)
    assert_moments(found, rows.double().numpy() / 255)
    exact = rows.double().T @ rows.double()  # of integers below 2^53
    np.testing.assert_allclose(found.gram() * 255**2, exact, rtol=1e-13, atol=1e-9)
    assert found.variance[:3].tolist() == pytest.approx([0, 0, 0], abs=1e-15)


@pytest.mark.parametrize(("device", "expected"), [("cuda", "cuda"), ("mps", "cpu"), ("cpu", "cpu")])
def test_moments_are_computed_on_a_device_with_float64(device, expected):
    # Fake tensors raise an error where tensors of two devices meet.
    with FakeTensorMode():
        for found in (
            feature_moments(torch.zeros(30, 8), torch.device(device)),
            pixel_moments(torch.zeros(30, 8, dtype=torch.uint8), torch.device(device)),
        ):
            assert {x.device.type for x in (*found[1:], found.gram())} == {expected}
            assert {x.dtype for x in (*found[1:], found.gram())} == {torch.float64}
