"""Retrieval against torchmetrics."""

import numpy as np
import pytest
import torch
from largest_tensor import largest_tensor
from short_runs import make_inputs
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_hit_rate,
    retrieval_precision,
    retrieval_reciprocal_rank,
)

from twoview import metrics
from twoview.evaluation import neighbors
from twoview.evaluation.retrieval import Retrieval, retrieval_figures
from twoview.losses import l2_normalize


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
        # torchmetrics treats scores of 0 and below as not retrieved.
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
def test_figures_equal_torchmetrics(case):
    queries, labels = cloud(6 if case == "few" else 60)
    gallery = cloud(25, seed=1) if case == "gallery" else None
    if case == "one class":
        labels = torch.zeros_like(labels)
    if case == "a class of one image":
        labels[7] = 9
    found = retrieval_figures(queries, labels, gallery, chunk=17)
    expected, counted = by_torchmetrics(queries, labels, gallery)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert (found["queries"], found["left_out"]) == (counted, len(queries) - counted)


@pytest.mark.parametrize("where", ["leave_one_out", "gallery"])
def test_the_measure_searches_where_it_is_told(where):
    (queries, labels), gallery = cloud(), cloud(25, seed=1)
    measure = Retrieval(retrieval=where, ranks=(2,))
    found = measure.score(None, make_inputs(*gallery, queries), labels)
    assert found == retrieval_figures(queries, labels, gallery if where == "gallery" else None, ranks=(2,))


def by_sorting(queries, labels, gallery=None, ranks=(1, 5, 10)):
    """Figures of whole rankings, in which irrelevant results come first among equally similar ones."""
    bank, bank_labels = gallery or (queries, labels)
    similarity = l2_normalize(queries) @ l2_normalize(bank).T
    relevant = labels[:, None] == bank_labels
    if gallery is None:
        relevant.fill_diagonal_(False)
        similarity.fill_diagonal_(-torch.inf)
    first = relevant.int().argsort(dim=1, stable=True)
    order = first.gather(1, similarity.gather(1, first).argsort(dim=1, stable=True, descending=True))
    ranked = relevant.gather(1, order)[relevant.any(1)]
    return {
        **{f"recall@{k}": metrics.recall_at_k(ranked, k) for k in ranks},
        **{f"precision@{k}": metrics.precision_at_k(ranked, k) for k in ranks},
        "mean_reciprocal_rank": metrics.mean_reciprocal_rank(ranked),
        "mean_average_precision": metrics.mean_average_precision(ranked),
        "queries": len(ranked),
        "left_out": len(queries) - len(ranked),
    }


@pytest.mark.parametrize("chunk", [0, 1, 64])
@pytest.mark.parametrize("case", ["leave one out", "gallery", "ties", "unequal classes", "classes only in queries"])
def test_blocks_give_the_figures_of_whole_rankings(case, chunk):
    queries, labels = cloud(300, 5)
    gallery = cloud(170, 5, seed=1) if case in ("gallery", "classes only in queries") else None
    if case == "ties":
        queries = torch.eye(5)[queries.argmax(1)] * queries.mean(1, keepdim=True).sign()  # similarities -1, 0 and 1
    if case == "unequal classes":
        labels = (torch.arange(300).sqrt() / 3).long()
    if case == "classes only in queries":
        labels = labels + 2
    found = retrieval_figures(queries, labels, gallery, chunk=chunk)
    assert found == pytest.approx(by_sorting(queries, labels, gallery), rel=1e-6)


def test_features_that_take_more_than_the_free_memory_are_scaled_in_blocks(monkeypatch):
    (queries, labels), gallery = cloud(), cloud(25, seed=1)
    whole = retrieval_figures(queries, labels, gallery)
    monkeypatch.setattr(neighbors, "available_memory", lambda device: 4 * 25 * 7 * 4)
    rows = neighbors.UnitRows(gallery[0], torch.device("cpu"), block=9)
    assert not rows.fits
    assert rows.features is gallery[0]
    unit = l2_normalize(queries)
    torch.testing.assert_close(rows.similarities(unit), unit @ l2_normalize(gallery[0]).T)
    assert retrieval_figures(queries, labels, gallery) == pytest.approx(whole)


def test_no_tensor_grows_with_the_number_of_pairs():
    queries, labels = cloud(4000, classes=50)
    assert largest_tensor(lambda: queries @ queries.T) == 16_000_000
    assert largest_tensor(lambda: retrieval_figures(queries, labels)) <= 2**22


def test_equal_features_gain_nothing_from_the_order_of_the_images():
    labels = torch.arange(40) // 10
    found = retrieval_figures(torch.ones(40, 3), labels)
    assert found["recall@10"] == 0
    assert found["mean_reciprocal_rank"] == pytest.approx(1 / 31)  # after all 30 of other classes
    # Signed zeros are equal too.
    zeros = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.0, 1.0], [0.0, -1.0]])
    found = retrieval_figures(zeros[:1], torch.tensor([1]), (zeros[1:], torch.tensor([1, 0, 1])))
    assert found["recall@1"] == 0


def test_classes_of_one_image_have_no_figures():
    found = retrieval_figures(torch.randn(3, 2), torch.arange(3))
    assert found == dict.fromkeys(found, None) | {"queries": 0, "left_out": 3}
