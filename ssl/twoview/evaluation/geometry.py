"""Distribution of features without any label: alignment, uniformity, spectrum, and a diagnosis of collapse."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twoview import metrics
from twoview.data import fixed_sample
from twoview.errors import require_at_least
from twoview.evaluation.invariance import augmented_features, mean_similarity
from twoview.evaluation.measure import ByName, Figures, Inputs, Measure
from twoview.evaluation.tables import Table, figures_table

# Thresholds of the diagnosis: constant features and features of rank 1 and 3 fall below them, all runs in
# docs/results.md lie far above.
MIN_SPREAD = 0.01
ONE_DIRECTION = 1.5
FEW_DIRECTIONS = 3.5


@dataclass(frozen=True)
class Geometry(Measure):
    """Alignment, uniformity, rank and spectrum of the features, and whether they have collapsed.

    Args:
        shift_images: number of test images whose views' alignment is measured, at least 2.

    Raises:
        UserError: a value out of range.
    """

    name = "geometry"

    shift_images: int = 1000

    def __post_init__(self) -> None:
        require_at_least("eval", 2, shift_images=self.shift_images)

    def choose(self, inputs: Inputs, earlier: ByName) -> Figures:
        """All figures; none needs a label."""
        pairs = None
        if inputs.encoder is not None:
            images = inputs.test_images.subset(fixed_sample(len(inputs.test_images), self.shift_images))
            pairs = augmented_features(inputs, images, inputs.views)
        return geometry_figures(inputs.train.features, pairs)

    def table(self, columns: ByName, report: ByName) -> Table:
        """Figures without the spectrum; the sentence of the diagnosis below."""
        words = next(iter(report["results"].values())).get(self.name, {}).get("words", "")
        hidden = ("spectrum", "words", "effective_rank_rows", "spread")
        return figures_table("Geometry", columns, f"{words}.", hidden)


def geometry_figures(features: Tensor, pairs: Sequence[Tensor] | None = None) -> Figures:
    """Distribution of features.

    Args:
        features: ``[N, F]``, N >= 2; means and spectrum are computed of at most 20,000 rows, similarities of 2,048.
        pairs: features of two views of the same images, ``[M, F]`` each; None for no alignment.

    Returns:
        * ``alignment`` and ``uniformity`` (Wang & Isola 2020), ``effective_rank`` (RankMe, of ``effective_rank_rows``
          rows; compares runs of one method only), ``feature_std`` (SimSiam): see :mod:`twoview.metrics`;
        * ``similarity``: mean cosine of different images;
        * ``spread``: standard deviation of the features around their mean, divided by their root mean square length, in
          [0, 1];
        * ``spectrum``: shares of the variance in its principal directions, decreasing, at most 512 of them;
          ``participation_ratio``: 1 / sum of their squares, the number of directions if all had equal variance;
        * ``spectrum_decay``: exponent a of spectrum ~ rank^-a (alpha-ReQ, Agrawal et al. 2022, arXiv:2202.05808), by
          least squares on logarithms weighted by 1 / rank (Stringer et al. 2019) over ranks 3 to half of those that are
          not zero; None where there are fewer than 3;
        * ``dead``: dimensions whose standard deviation is below a ten-thousandth of the mean; ``width``: F;
        * ``diagnosis`` and ``words``: :func:`diagnose`.
    """
    rows = features[fixed_sample(len(features), 20_000)].double()
    centered = rows - rows.mean(0)
    n, width = rows.shape
    deviation = centered.std(0, correction=0)
    small = centered.T @ centered if n >= width else centered @ centered.T
    variances = torch.linalg.eigvalsh(small / n).flip(0).clamp(min=0)
    total, length = float(variances.sum()), float(rows.square().sum(1).mean().sqrt())
    spread = total**0.5 / length if length else 0.0
    varies = spread > 1e-6  # constant features differ by rounding only
    shares = variances / total if varies else torch.zeros_like(variances)
    few = features[fixed_sample(len(features), 2048)]
    found = {
        "alignment": None if pairs is None else metrics.alignment(*pairs),
        "uniformity": metrics.uniformity(few),
        "effective_rank": metrics.effective_rank(rows[: 10 * width].float()),
        "effective_rank_rows": min(n, 10 * width),
        "feature_std": metrics.feature_std(few),
        "similarity": mean_similarity(few),
        "spread": spread,
        "participation_ratio": float(1 / shares.square().sum()) if varies else 0.0,
        "spectrum_decay": _decay(shares.numpy()),
        "dead": int((deviation <= 1e-4 * deviation.mean()).sum()) if varies else width,
        "width": width,
        "spectrum": shares[:512].tolist(),
    }
    return {**found, **diagnose(found)}


def diagnose(figures: Figures) -> dict[str, str]:
    """Diagnosis of collapse from :func:`geometry_figures`.

    "collapsed": a spread below 0.01, or a participation ratio below 1.5; "partly collapsed": below 3.5, or more than
    half of the dimensions dead; else "healthy". A low participation ratio counts only if the effective rank is below 8
    or a quarter of the width: otherwise one direction has much more variance than many others.

    Returns:
        ``diagnosis`` and a sentence, ``words``.
    """
    spread, directions, dead, width = (figures[k] for k in ("spread", "participation_ratio", "dead", "width"))
    low = figures["effective_rank"] < max(8, width / 4)
    diagnosis, words = "healthy", f"the features vary along {directions:.1f} of {width} directions"
    if spread < MIN_SPREAD:
        diagnosis, words = "collapsed", f"all images get nearly the same features (spread {spread:.2g} of their length)"
    elif low and directions < ONE_DIRECTION:
        diagnosis, words = "collapsed", f"the features vary along one direction only ({directions:.2f} of {width})"
    elif low and directions < FEW_DIRECTIONS:
        diagnosis, words = "partly collapsed", f"the features vary along only {directions:.1f} of {width} directions"
    elif 2 * dead > width:
        diagnosis, words = "partly collapsed", f"{dead} of {width} dimensions are constant"
    return {"diagnosis": diagnosis, "words": words}


def _decay(shares: np.ndarray) -> float | None:
    last = int((shares > 1e-9).sum()) // 2
    ranks = np.arange(3, last + 1)
    if len(ranks) < 3:
        return None
    # polyfit takes the weights of residuals, not of their squares.
    return -float(np.polyfit(np.log(ranks), np.log(shares[ranks - 1]), 1, w=ranks**-0.5)[0])
