"""Logistic regression in blocks of rows against plain formulas, scikit-learn and the solver for few images."""

import numpy as np
import pytest
import torch
from evaluation.helpers_evaluation import blobs
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from twoview.evaluation.feature_store import collect_features
from twoview.evaluation.lbfgs import minimize
from twoview.evaluation.logistic import feature_scale, fit_linear
from twoview.evaluation.logistic_blocks import Regression

OPTIONS = [{}, {"class_weights": torch.tensor([0.5, 2.0, 1.0, 0.7]), "label_smoothing": 0.1}]


def regression(features, labels, classes=4, **changes):
    return Regression(features, labels, feature_scale(features), classes, **changes)


def fit_path(problem, grid):
    """One classifier for each penalty, each fitted from the one before."""
    probes = [None]
    for l2 in grid:
        probe, converged = problem.fit(l2, probes[-1])
        assert converged
        probes.append(probe)
    return probes[1:]


def digits_features():
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


def mean_loss(problem, features, labels, weights, class_weights=None, label_smoothing=0.0):
    """The objective as written: float64, the whole matrix of scores, the documented coordinates."""
    scaled = (features.double() - features.double().mean(0)) @ problem.directions.double()
    each = F.cross_entropy(
        scaled @ weights[:-1] + weights[-1], labels, reduction="none", label_smoothing=label_smoothing
    )
    return (each if class_weights is None else each * class_weights.double()[labels]).mean()


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradient_equal_the_plain_formula_in_float64(options):
    features, labels = blobs(spread=3.0)
    problem = regression(features + 5, labels, rows=64, **options)
    weights = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    exact = weights.double().requires_grad_()
    expected = mean_loss(problem, features + 5, labels, exact, **options)
    expected.backward()
    value, gradient = problem.loss(weights)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_curvature_is_the_diagonal_of_the_hessian(options):
    features, labels = blobs(d=3, spread=3.0)
    problem = regression(features, labels, **options)
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    hessian = torch.autograd.functional.hessian(
        lambda w: mean_loss(problem, features, labels, w, **options), weights.double()
    )
    expected = hessian.view(16, 16).diagonal().view(4, 4)
    torch.testing.assert_close(problem.curvature(weights).double(), expected, rtol=1e-4, atol=1e-6)


def test_a_quadratic_function_is_minimized():
    scales = torch.logspace(-1, 1, 20)
    target = torch.arange(20.0)

    def objective(point):
        gradient = scales * (point - target)
        return float(0.5 * (gradient * (point - target)).sum()), gradient

    point, converged = minimize(objective, torch.zeros(20), 200, 1e-9)
    assert converged
    torch.testing.assert_close(point, target, rtol=0, atol=1e-3)
    assert not minimize(objective, torch.zeros(20), 2, 1e-9)[1]


def test_every_penalty_equals_scikit_learn():
    features, labels = blobs(300, 4, 16, spread=3.0)
    features = features * torch.logspace(0, -2, 16) + 5
    grid = [1.0, 1e-2, 1e-4]
    probes = fit_path(regression(features, labels), grid)
    standard = StandardScaler().fit_transform(features.double())
    for l2, probe in zip(grid, probes, strict=True):
        model = LogisticRegression(C=1 / (l2 * len(labels)), max_iter=5000, tol=1e-8).fit(standard, labels)
        ours = torch.softmax(features @ probe[:-1] + probe[-1], 1)
        np.testing.assert_allclose(ours, model.predict_proba(standard), atol=1e-2)


def test_fits_of_the_digits_equal_those_of_the_solver_for_few_images():
    features, labels = digits_features()
    grid = [1e-1, 1e-3]
    expected, _ = fit_linear(features, labels, grid)
    probes = fit_path(regression(features, labels, 10), grid)
    for ours, theirs in zip(probes, expected, strict=True):
        ours, theirs = (torch.softmax(features @ probe[:-1] + probe[-1], 1) for probe in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)
        assert torch.equal(ours.argmax(1), theirs.argmax(1))


@pytest.mark.parametrize("rows", [7, 100])
def test_the_size_of_the_blocks_does_not_change_the_fit(rows):
    features, labels = blobs(spread=3.0)
    whole, blocks = (regression(features, labels, rows=r).fit(1e-2)[0] for r in (None, rows))
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-3)


def test_a_fit_of_some_images_equals_scikit_learn_on_these_images():
    features, labels = blobs(spread=3.0)
    some = torch.arange(200)[::3]
    probe, _ = regression(features, labels, rows=16).fit(1e-2, positions=some)
    standard = StandardScaler().fit(features).transform(features)
    model = LogisticRegression(C=1 / (1e-2 * len(some)), max_iter=5000, tol=1e-8).fit(standard[some], labels[some])
    ours = torch.softmax(features @ probe[:-1] + probe[-1], 1)
    np.testing.assert_allclose(ours, model.predict_proba(standard), atol=5e-3)


def test_features_in_a_file_give_the_same_fit():
    features, labels = blobs(spread=3.0)
    mapped = collect_features(lambda: features.split(64), tuple(features.shape), memory=0)
    assert torch.equal(regression(mapped, labels).fit(1e-2)[0], regression(features, labels).fit(1e-2)[0])


def test_a_fit_that_starts_from_its_solution_ends_at_once():
    features, labels = blobs(spread=3.0)
    problem = regression(features, labels)
    solution, _ = problem.fit(1e-3, tolerance=1e-8)
    again, converged = problem.fit(1e-3, solution, max_iterations=1)
    assert converged
    torch.testing.assert_close(again, solution, rtol=1e-3, atol=1e-3)
    assert not problem.fit(1e-3, max_iterations=1)[1]


def test_constant_features_and_classes_without_images():
    features, labels = blobs(spread=3.0)
    wide = torch.cat([features, torch.full((200, 30), 3.3), features[:, :1]], 1)
    probe, *others = fit_path(regression(wide, labels, classes=6), [1e-2, 1e-3])
    assert all(x.isfinite().all() for x in (probe, *others))
    assert set((wide @ probe[:-1] + probe[-1]).argmax(1).tolist()) <= {0, 1, 2, 3}


def test_a_fit_that_does_not_converge_logs_a_warning(caplog):
    _, converged = regression(*blobs(spread=4.0)).fit(1e-4, max_iterations=2)
    assert not converged
    assert "not converged in 2 iterations; raise eval.max_iterations" in caplog.text
