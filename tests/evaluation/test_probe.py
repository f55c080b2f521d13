"""Scores of predictions against scikit-learn, scipy and loops."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from twoview.data import split_holdout
from twoview.errors import UserError
from twoview.evaluation.probe import Prediction, bootstrap, confusion, score


def test_the_holdout_is_stratified_fixed_by_seed_and_disjoint():
    labels = torch.arange(100) % 5
    fit, held = split_holdout(labels, 0.2, seed=3)
    assert len(set(fit.tolist()) | set(held.tolist())) == 100
    assert labels[held].bincount().tolist() == [4] * 5
    assert torch.equal(held, split_holdout(labels, 0.2, seed=3)[1])
    assert not torch.equal(held, split_holdout(labels, 0.2, seed=4)[1])
    split_holdout(torch.tensor([0, 1, 2, 0, 1, 2, 3]), 0.3, seed=0)  # a class of one image
    with pytest.raises(UserError, match="eval.holdout"):
        split_holdout(torch.tensor([0]), 0.2, seed=0)


def scored(labels, predicted, classes=4, probabilities=None):
    return score(Prediction(predicted, {}, probabilities), labels, classes, resamples=2000, seed=0)


@pytest.mark.parametrize("case", ["random", "one class", "all wrong", "a class without test images"])
def test_scores_equal_scikit_learn(case):
    generator = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(0, 4, (2, 120), generator=generator)
    if case == "one class":
        labels = torch.zeros_like(labels)
    if case == "all wrong":
        predicted = (labels + 1) % 4
    if case == "a class without test images":
        labels = labels.clamp(max=2)
    found = scored(labels, predicted)
    assert found["test_top1"] == pytest.approx(sk.accuracy_score(labels, predicted))
    present = labels.unique()
    recalls = sk.recall_score(labels, predicted, labels=present, average=None, zero_division=0)
    assert found["balanced_accuracy"] == pytest.approx(recalls.mean())
    expected = [None] * 4
    for c, recall in zip(present.tolist(), recalls, strict=True):
        expected[c] = pytest.approx(recall)
    assert found["per_class"] == expected
    table = confusion(Prediction(predicted, {}), labels, 4)
    for a in range(4):
        for b in range(4):
            assert table[a, b] == ((labels == a) & (predicted == b)).sum()


@pytest.mark.parametrize("case", ["random", "certain", "ties"])
def test_the_calibration_error_equals_a_loop_over_bins(case):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(3 * torch.randn(200, 4, generator=generator), 1)
    if case == "certain":
        probabilities = torch.nn.functional.one_hot(probabilities.argmax(1), 4).float()
    if case == "ties":
        probabilities = torch.full((200, 4), 0.25)
    labels = torch.randint(0, 4, (200,), generator=generator)
    confidence, predicted = probabilities.max(1)
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            right = (predicted == labels)[inside].double().mean()
            error += float(inside.double().mean() * abs(right - confidence[inside].double().mean()))
    assert scored(labels, predicted, 4, probabilities)["calibration_error"] == pytest.approx(error, abs=1e-6)


def test_the_interval_equals_that_of_a_binomial_distribution():
    correct = (torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.7).double().numpy()
    low, high = bootstrap(correct, 4000, seed=1)
    # Resampling zeros and ones is drawing from a binomial distribution.
    expected = stats.binom(400, correct.mean()).ppf([0.025, 0.975]) / 400
    assert [low, high] == pytest.approx(expected, abs=0.006)
    assert bootstrap(correct, 4000, seed=1) == [low, high]
    assert bootstrap(np.ones(20), 100, seed=0) == [1, 1]
    assert bootstrap(np.ones(1), 100, seed=0) == [1, 1]
