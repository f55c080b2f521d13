"""What features are like without a probe: retrieval, clusters, and the geometry of the cloud that they form."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from torch import Tensor

from twoview import metrics
from twoview.losses import unit_rows

# Thresholds of the diagnosis; constant, rank 1 and rank 3 fall below them, the runs in docs/results.md lie far above.
LEAST_SPREAD = 0.01
ONE_DIRECTION = 1.5
FEW_DIRECTIONS = 3.5


def retrieval(
    queries: Tensor,
    labels: Tensor,
    gallery: tuple[Tensor, Tensor] | None = None,
    ranks: Sequence[int] = (1, 5, 10),
    chunk: int = 0,
) -> dict[str, Any]:
    """How well images of the same class are found by cosine similarity.

    Of results that are equally similar, those of other classes come first: features that cannot tell images apart gain
    nothing from the order of the files.

    Args:
        queries: ``[N, F]``.
        labels: int64 ``[N]``.
        gallery: ``[M, F]`` and their labels; None looks each query up among the other queries.
        ranks: numbers of results that recall and precision look at.
        chunk: queries at a time, which bounds memory to ``chunk * M`` similarities; 0 for four millions of them.

    Returns:
        Means over queries that have anything to be found: ``recall@K``, ``precision@K``, ``mean_reciprocal_rank``,
        ``mean_average_precision`` of :mod:`twoview.metrics`; ``queries``, and ``left_out`` for want of another image of
        their class. The means are None if no query is left.
    """
    bank, bank_labels = gallery or (queries, labels)
    bank = unit_rows(bank)
    sums: dict[str, float] = {}
    counted, chunk = 0, chunk or max(1, 2**22 // len(bank))
    for start in range(0, len(queries), chunk):
        similarity = unit_rows(queries[start : start + chunk]) @ bank.T
        relevant = labels[start : start + chunk, None] == bank_labels
        if gallery is None:
            itself = torch.arange(len(similarity))
            relevant[itself, start + itself] = False
            similarity[itself, start + itself] = -torch.inf
        has_any = relevant.any(1)
        ranked = _ranked(similarity[has_any], relevant[has_any])
        counted += len(ranked)
        figures = {
            **{f"recall@{k}": metrics.recall_at_k(ranked, k) for k in ranks},
            **{f"precision@{k}": metrics.precision_at_k(ranked, k) for k in ranks},
            "mean_reciprocal_rank": metrics.mean_reciprocal_rank(ranked),
            "mean_average_precision": metrics.mean_average_precision(ranked),
        }
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + (value * len(ranked) if len(ranked) else 0.0)
    means = {name: total / counted if counted else None for name, total in sums.items()}
    return {**means, "queries": counted, "left_out": len(queries) - counted}


def _ranked(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Relevance in the order of falling similarity, the irrelevant first among equals."""
    # One sort of integers that hold both: the bits of a float in the order of its value, then the relevance.
    bits = (similarity.float() + 0.0).numpy().view(np.int32).astype(np.int64)
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 1) | ~relevant.numpy()
    keys.sort(axis=1)
    return torch.from_numpy(keys[:, ::-1] & 1 == 0)


def clustering(features: Tensor, labels: Tensor, classes: int, seed: int, sample: int = 2000) -> dict[str, Any]:
    """k-means on unit-length features, with as many clusters as there are classes, against the classes.

    Args:
        features: ``[N, F]``.
        labels: int64 ``[N]``.
        classes: number of clusters, cut to N.
        seed: of k-means, the best of five starts.
        sample: images of which the silhouette is taken.

    Returns:
        ``nmi`` in [0, 1] (arithmetic mean) and ``ari`` in [-0.5, 1] against the labels; ``silhouette`` of the clusters
        in [-1, 1], None where all images of the sample lie in one cluster or each in its own; ``clusters``.
    """
    unit = unit_rows(features).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct features than clusters
        assigned = KMeans(min(classes, len(unit)), n_init=5, random_state=seed).fit_predict(unit)
    part = np.random.default_rng(seed).permutation(len(unit))[:sample]
    distinct = len(np.unique(assigned[part]))
    apart = 1 < distinct < len(part)
    return {
        "nmi": float(normalized_mutual_info_score(labels, assigned)),
        "ari": float(adjusted_rand_score(labels, assigned)),
        "silhouette": float(silhouette_score(unit[part], assigned[part])) if apart else None,
        "clusters": len(np.unique(assigned)),
    }


def geometry(features: Tensor, pairs: Sequence[Tensor] | None = None) -> dict[str, Any]:
    """Where features lie, without any label.

    Args:
        features: ``[N, F]``, N >= 2; means and spectrum of at most 20,000 rows, similarities of 2,048.
        pairs: features of two views of the same images, ``[M, F]`` each; None for no alignment.

    Returns:
        * ``alignment`` and ``uniformity`` (Wang & Isola 2020), ``effective_rank`` (RankMe, of ``effective_rank_rows``
          rows; compares runs of one method only), ``feature_std`` (SimSiam): see :mod:`twoview.metrics`;
        * ``similarity``: mean cosine of different images;
        * ``spread``: deviation of the features from their mean over their root mean square length, in [0, 1];
        * ``spectrum``: shares of the variance in its principal directions, falling, at most 512 of them;
          ``directions``: their participation ratio, 1 / sum of squares, the number of directions if all were equal;
        * ``decay``: exponent a of spectrum ~ rank^-a (alpha-ReQ, Agrawal et al. 2022, arXiv:2202.05808), by least
          squares on logarithms weighted by 1 / rank (Stringer et al. 2019) over ranks 3 to half of those that are not
          zero, None where there are fewer than 3;
        * ``dead``: dimensions whose deviation is below a ten-thousandth of the mean deviation; ``width``: F;
        * ``diagnosis`` and ``words``: :func:`diagnose`.
    """
    rows = features[sample(len(features), 20_000)].double()
    centred = rows - rows.mean(0)
    n, width = rows.shape
    deviation = centred.std(0, correction=0)
    small = centred.T @ centred if n >= width else centred @ centred.T
    variances = torch.linalg.eigvalsh(small / n).flip(0).clamp(min=0)
    total, length = float(variances.sum()), float(rows.square().sum(1).mean().sqrt())
    # Constant features leave rounding alone.
    spread = total**0.5 / length if length else 0.0
    shares = variances / total if spread > 1e-6 else torch.zeros_like(variances)
    few = features[sample(len(features), 2048)]
    found = {
        "alignment": None if pairs is None else metrics.alignment(*pairs),
        "uniformity": metrics.uniformity(few),
        "effective_rank": metrics.effective_rank(rows[: 10 * width].float()),
        "effective_rank_rows": min(n, 10 * width),
        "feature_std": metrics.feature_std(few),
        "similarity": mean_similarity(few),
        "spread": spread,
        "directions": float(1 / shares.square().sum()) if spread > 1e-6 else 0.0,
        "decay": _decay(shares.numpy()),
        "dead": int((deviation <= 1e-4 * deviation.mean()).sum()) if spread > 1e-6 else width,
        "width": width,
        "spectrum": shares[:512].tolist(),
    }
    return {**found, **diagnose(found)}


def mean_similarity(features: Tensor) -> float:
    """Mean cosine of all pairs of different images, in [-1, 1]; features ``[N, F]``, N >= 2."""
    total = unit_rows(features).double().sum(0)
    return float((total @ total - len(features)) / (len(features) * (len(features) - 1)))


def diagnose(figures: dict[str, Any]) -> dict[str, str]:
    """Collapse in plain words, from what :func:`geometry` finds.

    "collapsed": a spread below 0.01, or the variance in fewer than 1.5 directions; "partly collapsed": in fewer than
    3.5, or more than half of the dimensions dead; else "healthy". Few directions count where the effective rank is
    below 8 or a quarter of the width.

    Returns:
        ``diagnosis`` and a sentence, ``words``.
    """
    spread, directions, dead, width = (figures[key] for key in ("spread", "directions", "dead", "width"))
    low = figures["effective_rank"] < max(8, width / 4)  # else one direction outweighs many others
    diagnosis, words = "healthy", f"the features vary along {directions:.1f} of {width} directions"
    if spread < LEAST_SPREAD:
        diagnosis, words = "collapsed", f"all images get nearly the same features (spread {spread:.2g} of their length)"
    elif low and directions < ONE_DIRECTION:
        diagnosis, words = "collapsed", f"the features vary along one direction alone ({directions:.2f} of {width})"
    elif low and directions < FEW_DIRECTIONS:
        diagnosis, words = "partly collapsed", f"the features vary along {directions:.1f} of {width} directions alone"
    elif 2 * dead > width:
        diagnosis, words = "partly collapsed", f"{dead} of {width} dimensions never change"
    return {"diagnosis": diagnosis, "words": words}


def _decay(shares: np.ndarray) -> float | None:
    last = int((shares > 1e-9).sum()) // 2
    ranks = np.arange(3, last + 1)
    if len(ranks) < 3:
        return None
    # polyfit takes the weights of residuals, not of their squares.
    return -float(np.polyfit(np.log(ranks), np.log(shares[ranks - 1]), 1, w=ranks**-0.5)[0])


def sample(size: int, limit: int) -> Tensor:
    """Positions of at most ``limit`` of ``size`` images at random, always the same."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:limit]
