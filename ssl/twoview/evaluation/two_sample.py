"""Two-sample tests by permutation: whether two sets of vectors are samples of the same distribution.

Rows of both sets are pooled and put in random order. What a test computes beside its statistic (bandwidth, scale,
folds, clusters) depends on the pooled rows only. If both sets are independent samples of one distribution, every
assignment of the rows to the two sets is therefore as probable as the observed one, and p values of permutations are
exact for any sizes, whatever the distribution. This does not hold for rows that depend on each other, such as frames of
one video.

Shapes: N pooled rows, D dimensions, B assignments.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import StandardScaler

from twoview.evaluation.clustering import cluster

FOLDS = 5
PENALTY = 0.1  # L2 penalty of the classifier for each training row; variances of the features are 1
AT_ONCE = 256  # assignments for which the kernel matrix is multiplied at once
TESTS = ("mmd", "classifier", "clusters")


def random_assignments(first: int, second: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw random assignments of rows to two sets of given sizes.

    Args:
        first: number of rows of the first set.
        second: number of rows of the second set.
        count: number B of assignments.
        generator: source of the random numbers.

    Returns:
        boolean ``[N, B]``, true for rows of the second set.

    Example:
        >>> random_assignments(3, 2, 4, np.random.default_rng(0)).sum(0).tolist()
        [2, 2, 2, 2]
    """
    rows = np.arange(first + second) >= first
    return np.ascontiguousarray(generator.permuted(np.tile(rows, (count, 1)), axis=1).T)


def gaussian_kernel(x: np.ndarray, y: np.ndarray, bandwidth: float) -> np.ndarray:
    """Gaussian kernel ``exp(-|x - y|^2 / (2 bandwidth^2))`` of all pairs, float64 ``[N, M]``."""
    return cast(np.ndarray, np.exp(euclidean_distances(x, y, squared=True) / (-2 * bandwidth**2)))


def median_distance(x: np.ndarray) -> float:
    """Median of the distances of all pairs of different vectors; 1 if all vectors are equal.

    The median heuristic of Gretton et al. 2012, section 8.
    """
    distances = euclidean_distances(x)  # each pair twice, which has the same median
    positive = distances[distances > 0]
    return float(np.median(positive)) if len(positive) else 1.0


def mmd_statistics(kernel: np.ndarray, assigned: np.ndarray) -> np.ndarray:
    """Unbiased estimates of the squared maximum mean discrepancy (MMD) of two sets, one for each assignment.

    Gretton et al. 2012, A kernel two-sample test, JMLR 13, eq. 3. The kernel matrix is not permuted: its sums over the
    rows of a set are products with the assignments.

    Args:
        kernel: float64 ``[N, N]``, symmetric.
        assigned: boolean ``[N, B]``, true for rows of the second set; at least two rows in each set.

    Returns:
        float64 ``[B]``; around 0, and negative too, for samples of one distribution.
    """
    rows, diagonal, found = kernel.sum(1), kernel.diagonal(), []
    for start in range(0, assigned.shape[1], AT_ONCE):
        z = assigned[:, start : start + AT_ONCE].astype(np.float64)
        m = z.sum(0)
        n = len(z) - m
        within, touching = np.einsum("nb,nb->b", z, kernel @ z), rows @ z
        # Pairs of a row with itself are left out of the sums within the sets.
        itself = diagonal @ z
        second = within - itself
        first = rows.sum() - 2 * touching + within - (diagonal.sum() - itself)
        across = touching - within
        found.append(first / (n * (n - 1)) + second / (m * (m - 1)) - 2 * across / (n * m))
    return np.concatenate(found)


def auc_statistics(x: np.ndarray, assigned: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """Area under the ROC curve (AUC) of cross-validated classifiers that tell the two sets apart, for each assignment.

    A classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv:1610.06545). Predictions of cross-validation depend on
    each other, so that a binomial test of them is not valid; in a test by permutation, each permutation needs
    classifiers of its own. The classifier is linear with squared loss and an L2 penalty on standardized features
    (scikit-learn's ``Ridge``), which is solved for all assignments at once. A logistic regression would be fitted
    thousands of times. Rows are compared with rows of the same fold, which the same classifier has scored.

    Args:
        x: float64 ``[N, D]``, rows in random order.
        assigned: boolean ``[N, B]``, true for rows of the second set.
        folds: number of folds of consecutive rows.

    Returns:
        float64 ``[B]`` in [0, 1]; near 0.5, and below it too, for samples of one distribution.
    """
    scaled = StandardScaler().fit_transform(x)
    targets = assigned.astype(np.float64)
    right, pairs = np.zeros(assigned.shape[1]), np.zeros(assigned.shape[1])
    for fold in np.array_split(np.arange(len(x)), folds):
        rest = np.delete(np.arange(len(x)), fold)
        classifier = Ridge(alpha=PENALTY * len(rest)).fit(scaled[rest], targets[rest])
        ranks = stats.rankdata(classifier.predict(scaled[fold]).reshape(len(fold), -1), axis=0)
        m = targets[fold].sum(0)
        right += (ranks * targets[fold]).sum(0) - m * (m + 1) / 2
        pairs += m * (len(fold) - m)
    return right / np.maximum(pairs, 1)


def chi_square_statistics(clusters: np.ndarray, assigned: np.ndarray) -> np.ndarray:
    """Pearson's chi-square of the table of clusters by sets, for each assignment.

    Args:
        clusters: int ``[N]``, cluster of each row.
        assigned: boolean ``[N, B]``, true for rows of the second set; at least one row in each set.

    Returns:
        float64 ``[B]``, at least 0.
    """
    members = (clusters == np.unique(clusters)[:, None]).astype(np.float64)
    count, m = members.sum(1)[:, None], assigned.sum(0)
    n = len(clusters) - m
    second = members @ assigned.astype(np.float64)
    expected = count * m / len(clusters)
    # The deviation of the first set is the negative one of the second set.
    return cast(np.ndarray, ((second - expected) ** 2 / expected * (m / n + 1)).sum(0))


def p_values(observed: np.ndarray, permuted: np.ndarray) -> np.ndarray:
    """Share of permutations with a statistic at least as large, ``(b + 1) / (B + 1)``, in (0, 1].

    Phipson & Smyth 2010, doi:10.2202/1544-6115.1585: the observed assignment counts as one of the permutations.

    Example:
        >>> p_values(np.array([2.5, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])).tolist()
        [0.6, 0.2]
    """
    rounding = 1e-10 * np.abs(permuted).max()
    larger = len(permuted) - np.searchsorted(np.sort(permuted), observed - rounding)
    return cast(np.ndarray, (larger + 1) / (len(permuted) + 1))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values (Holm 1979), which hold the family-wise error rate for tests of any dependence.

    Args:
        p: float ``[T, S]``, p values of T tests in each of S families.

    Returns:
        float64 ``[T, S]`` in (0, 1].

    Example:
        >>> holm(np.array([[0.01], [0.04], [0.03]])).ravel().tolist()
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, axis=0, kind="stable")
    steps = np.take_along_axis(p, order, 0) * np.arange(len(p), 0, -1)[:, None]
    adjusted = np.empty_like(steps)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(np.minimum(steps, 1), axis=0), 0)
    return adjusted.round(12)  # 3 * (1 / 40) is not above 0.075


@dataclass(frozen=True)
class Pool:
    """Rows of two sets in random order, and what the tests compute from them before they know the sets.

    Args:
        vectors: float64 ``[N, D]``.
        bandwidth: median distance, of the Gaussian kernel.
        kernel: float64 ``[N, N]``.
        clusters: int ``[N]``, cluster of each row by k-means on unit-length rows.
    """

    vectors: np.ndarray
    bandwidth: float
    kernel: np.ndarray
    clusters: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, clusters: int, seed: int) -> "Pool":
        """Prepare the tests.

        Args:
            vectors: float64 ``[N, D]``, rows in random order.
            clusters: largest number of clusters; a tenth of the rows if that is less.
            seed: seed of k-means.
        """
        bandwidth = median_distance(vectors)
        count = max(2, min(clusters, len(vectors) // 10))
        found = cluster(torch.from_numpy(vectors).float(), count, seed)
        return cls(vectors, bandwidth, gaussian_kernel(vectors, vectors, bandwidth), found)

    def statistics(self, assigned: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the statistics ``[B]`` of each of :data:`TESTS`."""
        yield mmd_statistics(self.kernel, assigned)
        yield auc_statistics(self.vectors, assigned)
        yield chi_square_statistics(self.clusters, assigned)

    def p_values(
        self, observed: np.ndarray, permutations: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Test assignments against random ones of the same sizes.

        Args:
            observed: boolean ``[N, S]``; all assignments have equal sizes of the sets.
            permutations: number of random assignments.
            generator: source of the random numbers.

        Returns:
            Statistics and p values, float64 ``[3, S]`` each, in the order of :data:`TESTS`.
        """
        second, count = int(observed[:, 0].sum()), observed.shape[1]
        random = random_assignments(len(observed) - second, second, permutations, generator)
        all_of_them = np.concatenate([observed, random], 1)
        found = np.stack([*self.statistics(all_of_them)])
        return found[:, :count], np.stack([p_values(row[:count], row[count:]) for row in found])


class Comparison(NamedTuple):
    """Result of the tests of two sets.

    Attributes:
        pool: the pooled rows.
        order: int ``[N]``, position of each pooled row among the rows of the first set followed by those of the second.
        statistics: float64 ``[3]``, in the order of :data:`TESTS`.
        p: float64 ``[3]``, p value of each test.
        adjusted_p: float64 ``[3]``, by :func:`holm`.
    """

    pool: Pool
    order: np.ndarray
    statistics: np.ndarray
    p: np.ndarray
    adjusted_p: np.ndarray


def compare_sets(
    first: np.ndarray, second: np.ndarray, clusters: int, permutations: int, generator: np.random.Generator
) -> Comparison:
    """Test whether two sets are samples of the same distribution.

    Args:
        first: float64 ``[n, D]``, n >= 2.
        second: float64 ``[m, D]``, m >= 2.
        clusters: largest number of clusters.
        permutations: number of permutations of each test.
        generator: source of all random numbers.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> x, y = generator.standard_normal((2, 50, 3))
        >>> compare_sets(x, y + 2, 5, 99, generator).adjusted_p.tolist()
        [0.03, 0.03, 0.03]
    """
    order = generator.permutation(len(first) + len(second))
    pool = Pool.of(np.concatenate([first, second])[order], clusters, int(generator.integers(2**31)))
    statistics, p = pool.p_values((order >= len(first))[:, None], permutations, generator)
    return Comparison(pool, order, statistics[:, 0], p[:, 0], holm(p)[:, 0])


def false_alarms(pool: Pool, splits: int, level: float, permutations: int, generator: np.random.Generator) -> int:
    """Count random splits of one set into halves for which any of the tests rejects at a family-wise level.

    Args:
        pool: rows of one set in random order.
        splits: number of splits.
        level: family-wise level, by :func:`holm`.
        permutations: number of permutations, which all splits share.
        generator: source of the random numbers.
    """
    half = len(pool.vectors) // 2
    observed = random_assignments(len(pool.vectors) - half, half, splits, generator)
    p = holm(pool.p_values(observed, permutations, generator)[1])
    return int((p.min(0) <= level).sum())


def share_interval(count: int, of: int) -> list[float]:
    """Exact 95 % interval of a probability (Clopper & Pearson 1934) after ``count`` events in ``of`` trials.

    Example:
        >>> [round(end, 3) for end in share_interval(5, 100)]
        [0.016, 0.113]
    """
    found = stats.binomtest(count, of).proportion_ci()
    return [float(found.low), float(found.high)]


def witness(rows: np.ndarray, own: np.ndarray, other: np.ndarray, member: np.ndarray, bandwidth: float) -> np.ndarray:
    """Kernel witness function: how much more of the own set than of the other set is around each row.

    Gretton et al. 2012, section 2.3. The kernel of a row with itself is left out.

    Args:
        rows: float64 ``[n, D]``, rows of the own set, whether sampled or not.
        own: float64 ``[N, D]``, sample of the own set, N >= 2.
        other: float64 ``[M, D]``, sample of the other set.
        member: boolean ``[n]``, which of the rows are in ``own``.
        bandwidth: of the Gaussian kernel.

    Returns:
        float64 ``[n]`` in [-1, 1]: mean kernel with the own set minus mean kernel with the other set.
    """
    itself = member.astype(np.float64)
    around = (gaussian_kernel(rows, own, bandwidth).sum(1) - itself) / (len(own) - itself)
    return cast(np.ndarray, around - gaussian_kernel(rows, other, bandwidth).mean(1))
