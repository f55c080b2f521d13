"""Retrieval against torchmetrics."""

import numpy as np
import pytest
import torch
from short_runs import make_inputs
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_hit_rate,
    retrieval_precision,
    retrieval_reciprocal_rank,
)

from twoview.evaluation.retrieval import Retrieval, retrieval_figures


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
