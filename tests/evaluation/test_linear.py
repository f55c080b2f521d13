"""The linear probe against scikit-learn."""

import numpy as np
import pytest
import torch
from evaluation.helpers_evaluation import blobs
from short_runs import make_inputs, take_measures
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from twoview.data import split_holdout
from twoview.evaluation.linear import Linear
from twoview.evaluation.logistic import fit_linear
from twoview.evaluation.probe import accuracy, linear_classes
from twoview.evaluation.settings import EvaluationSettings


def predict(measure, features, labels, test, classes=None):
    return measure.choose(make_inputs(features, labels, test, classes), {})


def test_the_probe_equals_scikit_learn_on_standardized_features():
    train, test = blobs(), blobs(seed=1)
    result = take_measures(*train, *test, EvaluationSettings(measures=(Linear(l2=(1e-2,)),)))["linear"]
    scaler = StandardScaler().fit(train[0])
    model = LogisticRegression(C=1 / (1e-2 * 200), max_iter=1000).fit(scaler.transform(train[0]), train[1])
    assert result["test_top1"] == pytest.approx(model.score(scaler.transform(test[0]), test[1]))
    assert result["converged"]


def test_balanced_class_weights_equal_scikit_learn():
    features, labels = blobs(300, 3, 6, spread=4.0)
    keep = (labels == 0) | (torch.arange(300) % 10 == 0)  # one class has ten times the images
    features, labels, test = features[keep], labels[keep], blobs(90, 3, 6, seed=1, spread=4.0)[0]
    result = {}
    for weights in ("none", "balanced"):
        result[weights] = predict(Linear(l2=(1e-2,), class_weights=weights), features, labels, test)
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=1 / (1e-2 * len(labels)), max_iter=5000, tol=1e-8, class_weight="balanced")
    expected = model.fit(scaler.transform(features), labels).predict_proba(scaler.transform(test))
    np.testing.assert_allclose(result["balanced"].probabilities, expected, atol=2e-3)
    assert (result["balanced"].classes == 0).sum() < (result["none"].classes == 0).sum()


def test_without_batch_norm_all_features_are_divided_by_one_scale():
    features, labels = blobs(spread=3.0)
    features = features * torch.logspace(-1, 1, 8)
    test = features[::3]
    measure = Linear(l2=(1e-2,), batch_norm=False)
    ours = predict(measure, features, labels, test)
    scale = float(features.var(0, correction=0).mean().sqrt())
    model = LogisticRegression(C=1 / (1e-2 * 200), max_iter=5000, tol=1e-8).fit(features / scale, labels)
    np.testing.assert_allclose(ours.probabilities, model.predict_proba(test / scale), atol=2e-3)
    larger = predict(measure, 1024 * features, labels, 1024 * test)  # a power of two rounds nothing
    np.testing.assert_allclose(larger.probabilities, ours.probabilities, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_without_batch_norm_constant_dimensions_only_change_the_scale(scale):
    features, labels = blobs(spread=3.0)
    found = []
    for dead in (0, 24):
        wide = scale * torch.cat([features, torch.full((200, dead), 0.7)], 1)
        found.append(predict(Linear(l2=(1e-2,), batch_norm=False), wide, labels, wide).probabilities)
    # The mean variance is over all dimensions: with four times as many, a quarter of the penalty has the same effect.
    alone = predict(Linear(l2=(2.5e-3,), batch_norm=False), features, labels, features)
    np.testing.assert_allclose(found[1], alone.probabilities, atol=2e-3)
    assert (found[0] - found[1]).abs().max() < 0.2


@pytest.mark.parametrize("constant", [0.0, 3.3])
def test_constant_features_predict_the_most_frequent_class(constant):
    labels = torch.tensor([0, 1, 1, 2, 1] * 6)
    for n in (30, 5):
        for measure in (Linear(), Linear(batch_norm=False), Linear(l2_images=3)):
            found = predict(measure, torch.full((n, 8), constant), labels[:n], torch.full((4, 8), constant), 3)
            assert found.classes.tolist() == [1] * 4


def test_the_classifier_of_a_prediction_gives_its_classes():
    (features, labels), (test, _) = blobs(), blobs(seed=1)
    found = predict(Linear(), features, labels, test)
    assert torch.equal(found.classify(test), found.classes)
    assert torch.equal(found.probabilities.argmax(1), found.classes)


def test_the_bounded_choice_is_fixed_by_the_seed():
    (features, labels), (test, _) = blobs(400, spread=4.0), blobs(seed=1)
    measure = Linear(l2=(1.0, 1e-2, 1e-4), l2_images=100)
    first, again, other = (
        measure.choose(make_inputs(features, labels, test, seed=seed, split_seed=0), {}) for seed in (0, 0, 1)
    )
    assert first.chosen == again.chosen
    assert torch.equal(first.probabilities, again.probabilities)
    assert first.chosen["val_top1"] != other.chosen["val_top1"]


def test_with_a_bounded_choice_all_training_images_are_fitted():
    (features, labels), (test, _) = blobs(400, spread=4.0), blobs(seed=1)
    found = predict(Linear(l2=(1e-1, 1e-2), l2_images=50), features, labels, test)
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=1 / (found.chosen["l2"] * 400), max_iter=5000, tol=1e-8)
    expected = model.fit(scaler.transform(features), labels).predict_proba(scaler.transform(test))
    np.testing.assert_allclose(found.probabilities, expected, atol=3e-3)
    assert found.chosen["converged"]


def test_a_bound_that_is_not_reached_changes_nothing():
    (features, labels), (test, _) = blobs(400, spread=4.0), blobs(seed=1)
    # 320 images are fitted. Without 319 of them, too few are left to stratify.
    first, *others = (predict(Linear(l2_images=bound), features, labels, test) for bound in (319, 320, 20_000))
    for other in others:
        assert first.chosen == other.chosen
        assert torch.equal(first.probabilities, other.probabilities)


def test_the_choice_on_a_part_is_corrected_on_all_fitted_images():
    features, labels = blobs(4000, 4, 30, seed=1, spread=4.0)
    grid = (10.0, 1.0, 1e-1, 1e-2, 1e-3)
    inputs = make_inputs(features, labels, features[:8])
    fitted, held_out = inputs.split()
    part = fitted[split_holdout(labels[fitted], 39.5 / len(fitted), 0)[1]]
    assert len(part) == 40
    probes, _ = fit_linear(features[part], labels[part], grid)
    alone = [accuracy(linear_classes(probe, features, held_out), labels[held_out]) for probe in probes]
    assert grid[np.argmax(alone)] == 1.0
    assert Linear(l2=grid, l2_images=40).choose(inputs, {}).chosen["l2"] == 1e-2
    assert Linear(l2=grid).choose(inputs, {}).chosen["l2"] == 1e-2
