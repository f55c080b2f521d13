"""Clusters against formulas and loops."""

import numpy as np
import pytest
import torch
from short_runs import make_inputs
from sklearn.cluster import KMeans
from sklearn.metrics import mutual_info_score

from twoview.evaluation import clustering
from twoview.evaluation.clustering import Clustering, cluster, clustering_figures


def cloud(n=60, d=7, classes=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.randint(0, classes, (n,), generator=generator)


def clustered(features, labels, classes):
    return clustering_figures(features, cluster(features, classes, seed=0), labels, seed=0)


def test_clusters_against_formulas():
    features, labels = cloud(200, 3, 3)
    features += 4 * torch.nn.functional.one_hot(labels, 3)
    found = clustered(features, labels, 3)
    assert found["clusters"] == 3
    # Clusters of distant classes are the classes.
    far = clustered(20 * torch.nn.functional.one_hot(labels, 3) + 0.1 * features, labels, 3)
    assert (far["nmi"], far["ari"]) == (pytest.approx(1), pytest.approx(1))
    assert far["silhouette"] > 0.9
    assert 0 < found["nmi"] < 1
    # One cluster has no information about three classes.
    one = clustered(features, labels, 1)
    assert one["nmi"] == pytest.approx(mutual_info_score(labels, np.zeros(200)), abs=1e-9)
    assert (one["ari"], one["silhouette"], one["clusters"]) == (pytest.approx(0), None, 1)


def test_the_silhouette_equals_a_loop():
    features, labels = cloud(30, 2, 2)
    unit = torch.nn.functional.normalize(features, dim=1).double().numpy()
    found = clustered(features, labels, 3)
    assigned = KMeans(3, n_init=5, random_state=0).fit_predict(unit.astype(np.float32))
    values = []
    for i in range(30):
        away = np.linalg.norm(unit - unit[i], axis=1)
        same = (assigned == assigned[i]) & (np.arange(30) != i)
        a = away[same].mean() if same.any() else 0
        b = min(away[assigned == c].mean() for c in set(assigned) - {assigned[i]})
        values.append((b - a) / max(a, b) if same.any() else 0)
    assert found["silhouette"] == pytest.approx(np.mean(values), abs=1e-5)


@pytest.mark.parametrize("features", [torch.ones(12, 4), torch.zeros(12, 4), torch.eye(4).repeat(3, 1)])
def test_fewer_distinct_features_than_classes(features):
    found = clustered(features, torch.arange(12) % 6, 6)
    assert found["clusters"] <= 4
    assert 0 <= found["nmi"] <= 1


def test_more_classes_than_images():
    assert clustered(*cloud(5), 50)["clusters"] == 5


def test_the_measure_clusters_before_labels_are_read():
    features, labels = cloud()
    inputs = make_inputs(features, labels, features)
    measure = Clustering()
    assigned = measure.choose(inputs, {})
    assert measure.score(assigned, inputs, labels) == clustered(features, labels, inputs.classes)


def test_many_images_are_clustered_by_mini_batches_as_well_as_by_all(monkeypatch):
    features, labels = cloud(12_000, 8, 6)
    features += 2 * torch.nn.functional.one_hot(labels, 8)
    few = clustered(features, labels, 6)
    monkeypatch.setattr(clustering, "MINI_BATCH_ROWS", 12_000)
    every = clustered(features, labels, 6)
    assert few != every  # another algorithm
    assert few["nmi"] == pytest.approx(every["nmi"], abs=0.03)
    assert few["clusters"] == 6
