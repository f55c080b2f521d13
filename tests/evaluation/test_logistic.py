"""Logistic regression against scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from evaluation.helpers_evaluation import blobs
from scipy import optimize
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from twoview.evaluation.logistic import fit_linear


def assert_equals_scikit_learn(features, labels, grid, probes):
    standard = StandardScaler().fit_transform(features.double())
    for l2, probe in zip(grid, probes, strict=True):
        model = LogisticRegression(C=1 / (l2 * len(labels)), max_iter=5000, tol=1e-8).fit(standard, labels)
        ours = torch.softmax(features @ probe[:-1] + probe[-1], 1)
        np.testing.assert_allclose(ours, model.predict_proba(standard), atol=2e-3)


@pytest.mark.parametrize("constant", [False, True])
def test_every_penalty_of_the_grid_equals_scikit_learn(constant):
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(16, 16, generator=generator)
    features = torch.randn(300, 16, generator=generator) * torch.logspace(0, -3, 16) @ turn + 5  # nearly dependent
    if constant:
        features[:, 3] = 7.0
    labels = (features[:, 4:7] + 0.5 * torch.randn(300, 3, generator=generator)).argmax(1)
    grid = [1.0, 1e-2, 1e-4]
    probes, converged = fit_linear(features, labels, grid, 1000)
    assert converged
    assert_equals_scikit_learn(features, labels, grid, probes)


def test_fewer_images_than_features_equals_scikit_learn():
    features, labels = blobs(30, 3, 100, spread=3.0)
    grid = [1.0, 1e-2]
    probes, _ = fit_linear(features, labels, grid, 1000)
    assert_equals_scikit_learn(features, labels, grid, probes)


def test_label_smoothing_equals_the_minimum_found_by_scipy():
    features, labels = blobs(60, 3, 2, spread=2.0)
    (probe,), _ = fit_linear(features, labels, [1e-2], label_smoothing=0.2)
    standard = StandardScaler().fit_transform(features.double())
    targets = 0.8 * np.eye(3)[labels] + 0.2 / 3

    def loss(flat):
        weights = flat.reshape(3, 3)
        scores = standard @ weights[:2] + weights[2]
        logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        return -(targets * logs).sum(1).mean() + 1e-2 / 2 * (weights[:2] ** 2).sum()

    weights = optimize.minimize(loss, np.zeros(9), tol=1e-10).x.reshape(3, 3)
    scores = standard @ weights[:2] + weights[2]
    expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(torch.softmax(features @ probe[:-1] + probe[-1], 1), expected, atol=1e-3)


def test_constant_and_repeated_features():
    features, labels = blobs()
    wide = torch.cat([features, torch.zeros(200, 227), features[:, :1].repeat(1, 20)], dim=1)
    probes, converged = fit_linear(wide, labels, [1e-2, 1e-3], 1000)
    assert converged
    assert probes.isfinite().all()


def test_a_fit_that_does_not_converge_logs_a_warning(caplog):
    _, converged = fit_linear(*blobs(spread=4.0), [1e-4], 2)
    assert not converged
    assert "not converged in 2 iterations; raise eval.max_iterations" in caplog.text
