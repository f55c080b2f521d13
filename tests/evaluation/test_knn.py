"""k nearest neighbors against scikit-learn."""

import numpy as np
import pytest
import torch
from evaluation.helpers_evaluation import blobs, figures_of
from short_runs import make_inputs
from sklearn.neighbors import KNeighborsClassifier

from twoview.data import fixed_sample, split_holdout
from twoview.evaluation import neighbors
from twoview.evaluation.knn import KNN
from twoview.losses import l2_normalize


def test_k_is_chosen_on_held_out_labels_as_by_scikit_learn():
    features, labels = blobs(spread=4.0)
    fit, held = split_holdout(labels, 0.2, seed=0)
    measure = KNN(k=(1, 20), temperature=(0.07,))
    result = figures_of(measure, make_inputs(features, labels, features), labels)
    best = -1.0, 0
    for k in (1, 20):
        model = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        score = model.fit(features[fit], labels[fit]).score(features[held], labels[held])
        best = max(best, (score, -k))
    assert (result["val_top1"], -result["k"]) == pytest.approx(best)


def test_k_is_limited_by_the_number_of_images():
    features, labels = blobs(20)
    assert KNN(k=(200,)).choose(make_inputs(features, labels, features), {}).chosen["k"] == 16


def test_balanced_choices_give_all_classes_equal_weight():
    # Where the rare class lies, four of five images are of the other class, so it never wins a vote of many neighbors.
    labels = (torch.arange(400) < 50).long()
    angles = torch.rand(400, generator=torch.Generator().manual_seed(0))
    angles[:250] *= 0.3
    angles[250:] += 1
    features, found = torch.stack([angles.cos(), angles.sin()], 1), {}
    for weights in ("none", "balanced"):
        measure = KNN(k=(1, 200), temperature=(1.0,), class_weights=weights)
        found[weights] = measure.choose(make_inputs(features, labels, features), {}).chosen["k"]
    assert found == {"none": 200, "balanced": 1}


def test_k_is_chosen_on_a_fixed_part_of_many_held_out_images():
    features, labels = blobs(spread=4.0)
    fit, held = split_holdout(labels, 0.2, seed=0)
    part = held[fixed_sample(len(held), 7)]
    model = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    model.fit(features[fit], labels[fit])
    found = KNN(k=(20,), temperature=(0.07,), k_images=7).choose(make_inputs(features, labels, features), {})
    assert found.chosen["val_top1"] == pytest.approx(model.score(features[part], labels[part]))
    assert found.chosen["val_top1"] != pytest.approx(model.score(features[held], labels[held]))


def test_neighbors_of_several_steps_are_those_of_one(monkeypatch):
    features, _ = blobs(spread=4.0)
    bank, queries = features[:150], features[150:]
    steps = []
    monkeypatch.setattr(neighbors, "track", lambda parts: steps.append([len(part) for part in parts]) or parts)
    whole = neighbors.neighbors(bank, queries, 5, torch.device("cpu"))
    expected = (l2_normalize(queries) @ l2_normalize(bank).T).topk(5)
    torch.testing.assert_close(whole, tuple(expected))
    assert steps.pop() == [len(queries)]
    for fewest, most, products, step in ((3, 100, 1, 3), (1, 100, 7 * bank.numel(), 7), (1, 5, 7 * bank.numel(), 5)):
        monkeypatch.setattr(neighbors, "FEWEST", fewest)
        monkeypatch.setattr(neighbors, "MOST", most)
        monkeypatch.setattr(neighbors, "PRODUCTS", products)
        torch.testing.assert_close(neighbors.neighbors(bank, queries, 5, torch.device("cpu")), whole)
        assert steps.pop()[0] == step
