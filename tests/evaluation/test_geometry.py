"""Distribution of features against numpy, closed forms, and constructed cases of collapse."""

import math

import numpy as np
import pytest
import torch

from twoview.evaluation.geometry import diagnose, geometry_figures
from twoview.evaluation.invariance import mean_similarity


def cloud(n=60, d=7, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [500, 20])  # more rows than dimensions, and fewer
def test_figures_equal_numpy(n):
    features = cloud(n, 40) * torch.linspace(0.1, 3, 40) + 1
    found = geometry_figures(features)
    values = np.linalg.svd(features.double().numpy() - features.double().numpy().mean(0), compute_uv=False) ** 2
    shares = values / values.sum()
    np.testing.assert_allclose(found["spectrum"][: min(n, 40)], shares[:40], atol=1e-9)
    assert found["participation_ratio"] == pytest.approx(1 / (shares**2).sum(), rel=1e-6)
    centered = features - features.mean(0)
    assert found["spread"] == pytest.approx(float(centered.norm() / features.norm()), rel=1e-5)
    assert (found["dead"], found["width"], found["alignment"]) == (0, 40, None)
    u = torch.nn.functional.normalize(features, dim=1)
    pairs = [float(u[i] @ u[j]) for i in range(n) for j in range(n) if i != j] if n == 20 else [found["similarity"]]
    assert found["similarity"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert mean_similarity(features) == pytest.approx(found["similarity"], abs=1e-6)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_spectrum_decay_of_a_power_law(exponent):
    # Orthogonal directions whose lengths follow the law.
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(400, 64, generator=generator, dtype=torch.float64)).Q
    basis = torch.linalg.qr(basis - basis.mean(0)).Q
    features = basis * torch.arange(1, 65) ** (-exponent / 2)
    assert geometry_figures(features)["spectrum_decay"] == pytest.approx(exponent, rel=0.01)


def test_alignment_is_the_mean_squared_distance_of_pairs():
    features = cloud()
    other = features + 0.3 * cloud(seed=2)
    u, v = (torch.nn.functional.normalize(x, dim=1) for x in (features, other))
    assert geometry_figures(features, (features, other))["alignment"] == pytest.approx(
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
    found = geometry_figures(planted(kind))
    assert found["diagnosis"] == diagnosis, found["words"]
    assert all(math.isfinite(x) for x in found.values() if isinstance(x, float))
    assert diagnose(found) == {"diagnosis": diagnosis, "words": found["words"]}


def test_one_dimension_of_large_variance_is_no_collapse():
    features = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    features[:, 7] *= 10
    found = geometry_figures(features)
    assert found["participation_ratio"] < 3.5
    assert found["diagnosis"] == "healthy"


def test_constant_features_have_no_spectrum_decay_and_only_dead_dimensions():
    found = geometry_figures(torch.full((20, 5), 3.3))
    assert (found["spectrum_decay"], found["dead"], found["participation_ratio"]) == (None, 5, 0.0)


def test_the_effective_rank_does_not_depend_on_the_order_of_the_images():
    generator = torch.Generator().manual_seed(0)
    # Each of eight classes lies in another plane; sorted by class, as in a folder.
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    parts = [torch.randn(300, 2, generator=generator) @ basis[2 * c : 2 * c + 2] for c in range(8)]
    assert geometry_figures(torch.cat(parts))["effective_rank"] > 15


def test_the_effective_rank_of_many_wide_features_is_that_of_their_singular_values():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8400, 850, generator=generator) * torch.logspace(0, -3, 850) + 0.7
    s = torch.linalg.svdvals(features.double())
    p = s / s.sum() + 1e-7
    expected = float((-(p * p.log()).sum()).exp())
    assert geometry_figures(features)["effective_rank"] == pytest.approx(expected, rel=1e-9)
