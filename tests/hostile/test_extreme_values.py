"""Embeddings so small or large that their squares leave the range of the floating type."""

import pytest
import torch
from torch.testing import assert_close

from twoview.losses import l2_normalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalization_of_ordinary_rows_is_division_by_the_norm_to_the_last_digit(dtype):
    scales = torch.logspace(-12, 12, 49, dtype=dtype)[:, None]
    x, weight = torch.randn(2, 49, 33, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x = (x * scales).requires_grad_()
    expected = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    assert torch.equal(l2_normalize(x), expected)
    gradients = [torch.autograd.grad((z * weight).sum(), x)[0] for z in (l2_normalize(x), expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-23, 1e-20, 1e19, 1e30])
def test_rows_whose_squares_under_or_overflow_are_normalized(scale):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * scale
    x.requires_grad_()
    assert_close(l2_normalize(x), (x.double() / x.double().norm(dim=1, keepdim=True)).float())
    (l2_normalize(x) * 1e-3).sum().backward()
    assert x.grad.isfinite().all()
    assert l2_normalize(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
