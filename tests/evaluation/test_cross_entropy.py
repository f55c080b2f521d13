"""Cross-entropy of blocks of images beside autograd, and the product that is divided among threads."""

import pytest
import torch
from torch.nn import functional as F

from twoview.evaluation.cross_entropy import softmax_errors, transposed_product


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sum_and_gradient_equal_those_of_autograd(weighted, smoothing):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 4, (7,), generator=generator)
    weights = torch.rand(4, generator=generator, dtype=torch.float64) if weighted else None
    each = F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
    expected = (each if weights is None else each * weights[labels]).sum()
    (gradient,) = torch.autograd.grad(expected, scores)
    total, errors = softmax_errors(scores.detach(), labels, weights, smoothing)
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(errors, gradient)


@pytest.mark.parametrize("rows", [0, 1, 5, 96, 97, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_product_for_any_number_of_rows_and_threads(rows, threads):
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    features = torch.randn(5, rows, generator=generator, dtype=torch.float64).T
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(transposed_product(errors, features), errors.T @ features)
    finally:
        torch.set_num_threads(before)
