"""Probes on few labels against scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from evaluation.helpers_evaluation import blobs
from scipy import stats
from short_runs import make_inputs
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from twoview.evaluation.few_labels import FewLabels, few_label_splits


def test_splits_are_fixed_balanced_and_nested():
    labels = torch.cat([torch.arange(200) % 4, torch.tensor([4, 4])])
    splits = few_label_splits(labels, FewLabels())
    assert list(splits) == ["1 per class", "5 per class", "10 per class", "1 %", "10 %"]
    for name, count in (("1 per class", 1), ("5 per class", 5), ("10 %", 5)):
        assert [len(draw) for draw in splits[name]] == [4 * count + min(2, 1 if name != "5 per class" else 2)] * 5
        for draw in splits[name]:
            assert labels[draw].bincount().tolist()[:4] == [count] * 4
    assert all(
        set(a.tolist()) <= set(b.tolist()) for a, b in zip(splits["1 per class"], splits["5 per class"], strict=True)
    )
    assert len({tuple(draw.tolist()) for draw in splits["5 per class"]}) == 5
    again = few_label_splits(labels, FewLabels())
    assert all(torch.equal(a, b) for name in splits for a, b in zip(splits[name], again[name], strict=True))


def test_no_other_label_is_used():
    (features, labels), (test, _) = blobs(), blobs(seed=1)
    measure = FewLabels(labels_per_class=(3,), label_shares=(0.1,))
    draw = few_label_splits(labels, measure)["3 per class"][0]
    others = torch.ones(len(labels), dtype=torch.bool)
    others[draw] = False
    # All other labels become those of one class, of which the draw then still takes the same images.
    candidates = [labels.where(~others, c) for c in range(4)]
    changed = next(x for x in candidates if torch.equal(few_label_splits(x, measure)["3 per class"][0], draw))
    found, again = (measure.choose(make_inputs(features, x, test), {}) for x in (labels, changed))
    assert torch.equal(found.predictions["3 per class"][0], again.predictions["3 per class"][0])
    assert not torch.equal(found.predictions["10 %"][0], again.predictions["10 %"][0])


def test_figures_are_the_mean_and_its_t_interval_of_probes_as_of_scikit_learn():
    (features, labels), (test, test_labels) = blobs(), blobs(seed=1)
    measure = FewLabels(labels_per_class=(3,), label_shares=(0.1,))
    inputs = make_inputs(features, labels, test)
    found = measure.choose(inputs, {})
    scores = measure.score(found, inputs, test_labels)["10 %"]
    accuracies = [sk.accuracy_score(test_labels, guesses) for guesses in found.predictions["10 %"]]
    assert scores["draws"] == pytest.approx(accuracies)
    interval = stats.t.interval(0.95, 4, np.mean(accuracies), stats.sem(accuracies))
    assert scores["interval"] == pytest.approx(list(interval))
    scaler = StandardScaler().fit(features)
    draw = found.splits["10 %"][0]
    model = LogisticRegression(C=1 / (0.1 * len(draw)), max_iter=5000, tol=1e-8)
    model.fit(scaler.transform(features[draw]), labels[draw])
    assert accuracies[0] == pytest.approx(model.score(scaler.transform(test), test_labels), abs=0.006)
