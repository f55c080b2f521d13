import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_hit_rate,
    retrieval_precision,
    retrieval_reciprocal_rank,
)

from twoview.evaluate.structure import clustering, diagnose, geometry, mean_similarity, retrieval


def cloud(n=60, d=7, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randint(0, classes, (n,), generator=generator)


def by_torchmetrics(queries, labels, gallery=None):
    """Query by query."""
    unit = torch.nn.functional.normalize(queries, dim=1)
    bank, bank_labels = (unit, labels) if gallery is None else gallery
    bank = torch.nn.functional.normalize(bank, dim=1)
    figures = {}
    for i in range(len(queries)):
        others = torch.arange(len(bank)) != (i if gallery is None else -1)
        # torchmetrics takes scores of 0 and below for no answer.
        scores, target = 2 + (bank @ unit[i])[others], (bank_labels == labels[i])[others]
        if target.any():
            found = {
                "mean_average_precision": retrieval_average_precision(scores, target),
                "mean_reciprocal_rank": retrieval_reciprocal_rank(scores, target),
            }
            for k in (1, 5, 10):
                found[f"recall@{k}"] = retrieval_hit_rate(scores, target, top_k=k)
                found[f"precision@{k}"] = retrieval_precision(scores, target, top_k=k)
            for name, value in found.items():
                figures.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in figures.items()}, len(figures["mean_reciprocal_rank"])


@pytest.mark.parametrize("case", ["random", "one class", "a class of one image", "gallery", "few"])
def test_retrieval_is_torchmetrics(case):
    queries, labels = cloud(6 if case == "few" else 60)
    gallery = cloud(25, seed=1) if case == "gallery" else None
    if case == "one class":
        labels = torch.zeros_like(labels)
    if case == "a class of one image":
        labels[7] = 9
    found = retrieval(queries, labels, gallery, chunk=17)
    expected, counted = by_torchmetrics(queries, labels, gallery)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert (found["queries"], found["left_out"]) == (counted, len(queries) - counted)


def test_equal_features_find_nothing_in_whichever_order_the_files_lie():
    labels = torch.arange(40) // 10
    found = retrieval(torch.ones(40, 3), labels)
    assert found["recall@10"] == 0
    assert found["mean_reciprocal_rank"] == pytest.approx(1 / 31)  # after all 30 of other classes
    # Signed zeros are equal too.
    zeros = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.0, 1.0], [0.0, -1.0]])
    assert retrieval(zeros[:1], torch.tensor([1]), (zeros[1:], torch.tensor([1, 0, 1])))["recall@1"] == 0


def test_retrieval_of_classes_of_one_image_is_nothing():
    found = retrieval(torch.randn(3, 2), torch.arange(3))
    assert found == dict.fromkeys(found, None) | {"queries": 0, "left_out": 3}


def test_clusters_against_formulas():
    features, labels = cloud(200, 3, 3)
    features += 4 * torch.nn.functional.one_hot(labels, 3)
    found = clustering(features, labels, 3, seed=0)
    assert found["clusters"] == 3
    # The formulas of NMI and ARI, on the assignment that gives them: exact clusters of far classes are the labels.
    far = clustering(20 * torch.nn.functional.one_hot(labels, 3) + 0.1 * features, labels, 3, seed=0)
    assert (far["nmi"], far["ari"]) == (pytest.approx(1), pytest.approx(1))
    assert far["silhouette"] > 0.9
    assert 0 < found["nmi"] < 1
    # One cluster against three classes shares no information.
    one = clustering(features, labels, 1, seed=0)
    assert one["nmi"] == pytest.approx(mutual_info_score(labels, np.zeros(200)), abs=1e-9)
    assert (one["ari"], one["silhouette"], one["clusters"]) == (pytest.approx(0), None, 1)


def test_silhouette_is_the_loop():
    features, labels = cloud(30, 2, 2)
    unit = torch.nn.functional.normalize(features, dim=1).double().numpy()
    found = clustering(features, labels, 3, seed=0)
    from sklearn.cluster import KMeans

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
def test_clusters_of_fewer_distinct_features_than_classes(features):
    found = clustering(features, torch.arange(12) % 6, 6, seed=0)
    assert found["clusters"] <= 4
    assert 0 <= found["nmi"] <= 1


def test_more_classes_than_images():
    assert clustering(*cloud(5), 50, seed=0)["clusters"] == 5


@pytest.mark.parametrize("n", [500, 20])  # more rows than dimensions, and fewer
def test_geometry_is_numpys(n):
    features = cloud(n, 40)[0] * torch.linspace(0.1, 3, 40) + 1
    found = geometry(features)
    values = np.linalg.svd(features.double().numpy() - features.double().numpy().mean(0), compute_uv=False) ** 2
    shares = values / values.sum()
    np.testing.assert_allclose(found["spectrum"][: min(n, 40)], shares[:40], atol=1e-9)
    assert found["directions"] == pytest.approx(1 / (shares**2).sum(), rel=1e-6)
    centred = features - features.mean(0)
    assert found["spread"] == pytest.approx(float(centred.norm() / features.norm()), rel=1e-5)
    assert (found["dead"], found["width"], found["alignment"]) == (0, 40, None)
    u = torch.nn.functional.normalize(features, dim=1)
    pairs = [float(u[i] @ u[j]) for i in range(n) for j in range(n) if i != j] if n == 20 else [found["similarity"]]
    assert found["similarity"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert mean_similarity(features) == pytest.approx(found["similarity"], abs=1e-6)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_decay_of_a_power_law(exponent):
    # Exactly such a spectrum: orthogonal directions, whose lengths follow the law.
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(400, 64, generator=generator, dtype=torch.float64)).Q
    basis = torch.linalg.qr(basis - basis.mean(0)).Q
    features = basis * torch.arange(1, 65) ** (-exponent / 2)
    assert geometry(features)["decay"] == pytest.approx(exponent, rel=0.01)


def test_alignment_is_that_of_the_pairs():
    features, _ = cloud()
    other = features + 0.3 * cloud(seed=2)[0]
    u, v = (torch.nn.functional.normalize(x, dim=1) for x in (features, other))
    assert geometry(features, (features, other))["alignment"] == pytest.approx(
        float(((u - v) ** 2).sum(1).mean()), rel=1e-5
    )


def planted(kind, n=600, d=64):
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(d, generator=generator)
    noise = torch.randn(n, d, generator=generator)
    if kind == "constant":
        return mean.expand(n, d)
    if kind == "zero":
        return torch.zeros(n, d)
    if kind == "nearly constant":
        return mean + 1e-3 * noise
    if kind == "dead":
        return torch.cat([noise[:, : d // 4], torch.zeros(n, 3 * d // 4)], 1)
    rank = int(kind[-1])
    return mean + torch.randn(n, rank, generator=generator) @ noise[:rank] + 1e-3 * noise


@pytest.mark.parametrize(
    ("kind", "diagnosis"),
    [
        ("constant", "collapsed"),
        ("zero", "collapsed"),
        ("nearly constant", "collapsed"),
        ("rank 1", "collapsed"),
        ("rank 3", "partly collapsed"),
        ("dead", "partly collapsed"),
        ("rank 9", "healthy"),
    ],
)
def test_planted_collapse_is_diagnosed(kind, diagnosis):
    found = geometry(planted(kind))
    assert found["diagnosis"] == diagnosis, found["words"]
    assert all(math.isfinite(x) for x in found.values() if isinstance(x, float))
    assert diagnose(found) == {"diagnosis": diagnosis, "words": found["words"]}


def test_a_dimension_that_outweighs_many_is_no_collapse():
    features = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    features[:, 7] *= 10
    found = geometry(features)
    assert found["directions"] < 3.5
    assert found["diagnosis"] == "healthy"


def test_constant_features_have_no_decay_and_only_dead_dimensions():
    found = geometry(torch.full((20, 5), 3.3))
    assert (found["decay"], found["dead"], found["directions"]) == (None, 5, 0.0)
