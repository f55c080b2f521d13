"""Two-sample tests: statistics equal plain loops and other libraries, p values are uniform without drift."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from twoview.evaluation.two_sample import (
    FOLDS,
    PENALTY,
    Pool,
    auc_statistics,
    chi_square_statistics,
    compare_sets,
    false_alarms,
    gaussian_kernel,
    holm,
    median_distance,
    mmd_statistics,
    p_values,
    random_assignments,
    share_interval,
    witness,
)


def draw(seed, rows, width=3):
    """Vectors of a distribution with heavy tails, dependent dimensions and three modes."""
    generator = np.random.default_rng(seed)
    x = generator.standard_t(3, (rows, width))
    x[:, 1] = x[:, 0] ** 2 + 0.1 * x[:, 1]
    return x + 5 * generator.integers(0, 3, (rows, 1))


def assigned(seed, first, second, count):
    return random_assignments(first, second, count, np.random.default_rng(seed))


def mmd_by_hand(x, y, bandwidth):
    """Gretton et al. 2012, eq. 3, with the Gaussian kernel."""

    def kernel(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * bandwidth**2))

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    across = sum(kernel(x[i], y[j]) for i in range(n) for j in range(m))
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)


@pytest.mark.parametrize("sizes", [(12, 17), (2, 9)])
def test_mmd_equals_its_formula_in_loops(sizes):
    x, z = draw(0, sum(sizes)), assigned(1, *sizes, 300)  # more assignments than are computed at once
    found = mmd_statistics(gaussian_kernel(x, x, 1.7), z)
    assert found.shape == (300,)
    for place in (0, 1, 255, 256, 299):
        expected = mmd_by_hand(x[~z[:, place]].tolist(), x[z[:, place]].tolist(), 1.7)
        assert found[place] == pytest.approx(expected, rel=0, abs=1e-10)


def test_the_bandwidth_is_the_median_distance_of_different_vectors():
    x = draw(0, 15)
    pairs = [math.dist(x[i], x[j]) for i in range(15) for j in range(i)]
    assert median_distance(x) == pytest.approx(float(np.median(pairs)), rel=1e-9)
    assert median_distance(np.array([[0.0], [0.0], [0.0], [3.0]])) == pytest.approx(3.0)
    assert median_distance(np.ones((4, 2))) == 1.0


def test_auc_equals_classifiers_that_are_fitted_one_by_one():
    x, z = draw(0, 53, 6), assigned(1, 30, 23, 8)
    scaled = (x - x.mean(0)) / x.std(0)
    for place in range(8):
        right, pairs = 0.0, 0
        for fold in np.array_split(np.arange(53), FOLDS):
            rest = np.array([row for row in range(53) if row not in fold])
            classifier = Ridge(alpha=PENALTY * len(rest)).fit(scaled[rest], z[rest, place])
            count = int(z[fold, place].sum()) * int((~z[fold, place]).sum())
            right += count * roc_auc_score(z[fold, place], classifier.predict(scaled[fold]))
            pairs += count
        assert auc_statistics(x, z)[place] == pytest.approx(right / pairs, abs=1e-10)


def test_a_fold_of_one_set_does_not_count():
    x, z = draw(0, 20), np.zeros((20, 1), dtype=bool)
    z[:4] = True  # the first of five folds
    assert auc_statistics(x, z).tolist() == [0.0]


def test_chi_square_equals_that_of_scipy():
    clusters, z = np.random.default_rng(0).integers(3, 9, 80), assigned(1, 50, 30, 5)
    for place, found in enumerate(chi_square_statistics(clusters, z)):
        table = [[int((clusters[side] == c).sum()) for c in range(3, 9)] for side in (z[:, place], ~z[:, place])]
        assert found == pytest.approx(stats.chi2_contingency(table, correction=False).statistic, rel=1e-12)


def test_p_values_count_the_observed_assignment_and_ties():
    permuted = np.array([0.1, 0.3, 0.2, 0.3])
    expected = [1 / 5, 3 / 5, 3 / 5, 5 / 5]
    assert p_values(np.array([0.31, 0.3, 0.3 + 1e-13, 0.0]), permuted).tolist() == expected


def test_holm_equals_its_steps():
    p = np.random.default_rng(0).random((3, 40)) ** 3
    adjusted = holm(p)
    for column, found in zip(p.T, adjusted.T, strict=True):
        largest = 0.0
        for step, test in enumerate(sorted(range(3), key=lambda i: column[i])):
            largest = max(largest, min(1.0, (3 - step) * column[test]))
            assert found[test] == pytest.approx(largest, abs=1e-12)


@pytest.mark.parametrize(("level", "permutations"), [(0.075, 39), (0.15, 19), (0.05, 59), (0.001, 2999)])
def test_the_smallest_p_value_of_the_fewest_permutations_rejects(level, permutations):
    p = p_values(np.array([1.0]), np.zeros(permutations))
    assert holm(np.array([p, [0.9], [0.9]])).min() <= level


@pytest.fixture(scope="module")
def without_drift():
    """P values ``[3, 480]`` of samples of one distribution, of equal and of unequal sizes."""
    found = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        sizes = ((20, 20), (14, 32))[seed % 2]
        x, observed = draw(1000 + seed, sum(sizes)), random_assignments(*sizes, 8, generator)
        found.append(Pool.of(x, 4, seed).p_values(observed, 119, generator)[1])
    return np.concatenate(found, axis=1)


def test_p_values_are_uniform_without_drift(without_drift):
    for test, p in enumerate(without_drift):
        for limit in (0.05, 0.1, 0.25, 0.5, 0.75):
            count, deviation = (p <= limit).sum(), math.sqrt(480 * limit * (1 - limit))
            assert count <= 480 * limit + 4 * deviation
            # Chi-square has ties, which make p values larger.
            assert test == 2 or count >= 480 * limit - 4 * deviation


def test_the_family_wise_rate_of_false_alarms_is_at_most_the_level(without_drift):
    for level in (0.1, 0.2, 0.4):
        alarms = (holm(without_drift).min(0) <= level).sum()
        assert 0 < alarms <= 480 * level + 4 * math.sqrt(480 * level * (1 - level))


@pytest.mark.parametrize("kind", ["mean", "variance", "share of a mode"])
def test_planted_shifts_are_found(kind):
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 100, 4))
    y = {"mean": y + 0.7, "variance": 2 * y, "share of a mode": y + 8 * (np.arange(100) < 20)[:, None]}[kind]
    p = compare_sets(x, y, 10, 199, generator).p
    assert p[0] == 1 / 200
    assert p.shape == (3,)
    # A linear classifier does not see that the variance has changed.
    assert (p[1] <= 0.05) == (kind != "variance")
    assert kind == "variance" or p[2] <= 0.02


def test_equal_vectors_are_no_drift():
    observed = (np.arange(40) >= 20)[:, None]
    p = Pool.of(np.ones((40, 3)), 5, 0).p_values(observed, 99, np.random.default_rng(0))[1]
    assert p.tolist() == [[1.0], [1.0], [1.0]]


def test_more_dimensions_than_rows():
    x = np.random.default_rng(0).standard_normal((60, 500))
    found = compare_sets(x[:30] + 0.4, x[30:], 5, 99, np.random.default_rng(1))
    assert found.p[:2].tolist() == [0.01, 0.01]
    assert np.array_equal(found.pool.vectors, np.concatenate([x[:30] + 0.4, x[30:]])[found.order])


def test_false_alarms_are_counted_on_splits():
    pool = Pool.of(draw(0, 60), 5, 0)
    alarms = false_alarms(pool, 400, 0.3, 99, np.random.default_rng(0))
    assert 20 < alarms < 400 * 0.3 + 3 * math.sqrt(400 * 0.3 * 0.7)
    low, high = share_interval(alarms, 400)
    assert stats.binom.sf(alarms - 1, 400, low) == pytest.approx(0.025)
    assert stats.binom.cdf(alarms, 400, high) == pytest.approx(0.025)


def test_witness_equals_its_formula_in_loops():
    own, other = draw(0, 12), draw(1, 9)
    rows, member = np.concatenate([own[:4], draw(2, 3)]), np.array([True] * 4 + [False] * 3)
    kernel = [[[math.exp(-(math.dist(a, b) ** 2) / 8) for b in c] for c in (own, other)] for a in rows]
    expected = []
    for row in range(7):
        same = [value for place, value in enumerate(kernel[row][0]) if not member[row] or place != row]
        expected.append(sum(same) / len(same) - sum(kernel[row][1]) / 9)
    assert witness(rows, own, other, member, 2.0) == pytest.approx(expected, abs=1e-12)


def test_k_means_does_not_see_the_sets():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)).double().numpy()
    pool = Pool.of(x, 50, 0)
    assert len(np.unique(pool.clusters)) == 10  # a tenth of the rows
