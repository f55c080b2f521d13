"""Agreement of k-means clusters with the classes."""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from torch import Tensor

from twoview.evaluation.measure import ByName, Figures, Inputs, Measure, Workload
from twoview.evaluation.tables import Table, figures_table
from twoview.losses import l2_normalize

MINI_BATCH_ROWS = 10_000  # above this number of rows, k-means uses mini-batches


@dataclass(frozen=True)
class Clustering(Measure):
    """k-means on unit-length features of the test images, with as many clusters as classes."""

    name = "clustering"

    def choose(self, inputs: Inputs, earlier: ByName) -> np.ndarray:
        """Return the cluster of each test image, int32 ``[T]``."""
        return cluster(inputs.test, inputs.classes, inputs.seed)

    def score(self, chosen: np.ndarray, inputs: Inputs, labels: Tensor) -> Figures:
        """Return the metrics of :func:`clustering_figures`."""
        return clustering_figures(inputs.test, chosen, labels, inputs.seed)

    def expected_seconds(self, work: Workload) -> float:
        """See :class:`Measure`."""
        passes = 5 * 20 if work.test <= MINI_BATCH_ROWS else 20
        return 2 * passes * work.test * work.width * work.classes * work.operation_seconds

    def table(self, columns: ByName, report: ByName) -> Table:
        """Return a table of all metrics."""
        method = "k-means" if report["protocol"]["test_images"] <= MINI_BATCH_ROWS else "mini-batch k-means"
        note = f"{method} on unit-length features of test images, as many clusters as classes."
        return figures_table("Clustering", columns, note)


def cluster(features: Tensor, clusters: int, seed: int) -> np.ndarray:
    """Assign each row to a cluster by k-means on unit-length rows, with the best of five initializations.

    Above 10,000 rows, k-means uses mini-batches of 4,096 rows (Sculley 2010, doi:10.1145/1772690.1772862), and the best
    initialization is selected on a sample before the fit.

    Args:
        features: fp32 ``[N, F]``.
        clusters: number of clusters; N if it is larger than N.
        seed: seed of k-means.

    Returns:
        int32 ``[N]``, cluster of each row.
    """
    unit = l2_normalize(features).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct features than clusters
        count = min(clusters, len(unit))
        if len(unit) > MINI_BATCH_ROWS:
            means: KMeans | MiniBatchKMeans = MiniBatchKMeans(count, n_init=5, random_state=seed, batch_size=4096)
        else:
            means = KMeans(count, n_init=5, random_state=seed)
        assigned: np.ndarray = means.fit_predict(unit)
    return assigned


def clustering_figures(
    features: Tensor, assigned: np.ndarray, labels: Tensor, seed: int, sample: int = 2000
) -> Figures:
    """Compare clusters with the classes.

    Args:
        features: fp32 ``[N, F]``.
        assigned: int32 ``[N]``, cluster of each row.
        labels: int64 ``[N]``.
        seed: seed of the random sample for the silhouette.
        sample: number of images from which the silhouette is computed.

    Returns:
        * ``nmi``: normalized mutual information of clusters and labels (arithmetic normalization), in [0, 1];
        * ``ari``: adjusted Rand index of clusters and labels, in [-0.5, 1];
        * ``silhouette``: mean silhouette coefficient of the clusters, in [-1, 1]. None if all images of the sample lie
          in one cluster, or each image lies in a cluster of its own;
        * ``clusters``: number of clusters that contain images.
    """
    unit = l2_normalize(features).numpy()
    part = np.random.default_rng(seed).permutation(len(unit))[:sample]
    distinct = len(np.unique(assigned[part]))
    defined = 1 < distinct < len(part)
    return {
        "nmi": float(normalized_mutual_info_score(labels, assigned)),
        "ari": float(adjusted_rand_score(labels, assigned)),
        "silhouette": float(silhouette_score(unit[part], assigned[part])) if defined else None,
        "clusters": len(np.unique(assigned)),
    }
