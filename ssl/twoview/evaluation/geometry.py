"""Measures of features that need no labels: alignment, uniformity, spectrum, and a diagnosis of collapse."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twoview import metrics
from twoview.data import fixed_sample
from twoview.errors import require_at_least
from twoview.evaluation.invariance import augmented_features, mean_similarity
from twoview.evaluation.measure import ByName, Figures, Inputs, Measure, Workload
from twoview.evaluation.moments import ROWS, Moments, feature_moments
from twoview.evaluation.tables import Table, figures_table

# Thresholds of the diagnosis. Constant features lie below the first threshold, features of rank 1 below the second, and
# features of rank 3 below the third. All trained networks in docs/results.md lie far above.
MIN_SPREAD = 0.01
ONE_DIRECTION = 1.5
FEW_DIRECTIONS = 3.5


@dataclass(frozen=True)
class Geometry(Measure):
    """Alignment, uniformity, rank and spectrum of the features, and whether they have collapsed.

    Args:
        shift_images: number of test images on which alignment is measured, at least 2.

    Raises:
        UserError: if a value is out of range.
    """

    name = "geometry"

    shift_images: int = 1000

    def __post_init__(self) -> None:
        require_at_least("eval", 2, shift_images=self.shift_images)

    def choose(self, inputs: Inputs, earlier: ByName) -> Figures:
        """Return the metrics of :func:`geometry_figures`; of projected pixels, those of the pixels themselves."""
        pairs = None
        if inputs.encoder is not None:
            images = inputs.test_images.subset(fixed_sample(len(inputs.test_images), self.shift_images))
            pairs = augmented_features(inputs, images, inputs.views)
        if inputs.projection is not None:
            pixels = inputs.thumbnails["train"].pixels.flatten(1)
            return geometry_figures(pixels, pairs, moments=inputs.projection.moments)
        return geometry_figures(inputs.train.features, pairs, inputs.device)

    def expected_seconds(self, work: Workload) -> float:
        """See :class:`Measure`."""
        rows = min(work.train, ROWS)
        products = 8 * rows * work.width**2 * work.operation_seconds
        return products + 2 * min(self.shift_images, work.test) * work.image_seconds

    def table(self, columns: ByName, report: ByName) -> Table:
        """Return a table of the metrics without the spectrum; the note is the sentence of the diagnosis."""
        words = next(iter(report["results"].values())).get(self.name, {}).get("words", "")
        hidden = ("spectrum", "words", "effective_rank_rows", "spread")
        return figures_table("Geometry", columns, f"{words}.", hidden)


def geometry_figures(
    features: Tensor,
    pairs: Sequence[Tensor] | None = None,
    device: torch.device | None = None,
    moments: Moments | None = None,
) -> Figures:
    """Compute metrics of the distribution of features.

    Args:
        features: fp32 ``[N, F]``, N >= 2, or pixels uint8 ``[N, F]``, which are divided by 255. At most 20,000 rows are
            used; at most 2,048 rows for ``uniformity``, ``feature_std`` and ``similarity``.
        pairs: features of two views of the same images, fp32 ``[M, F]`` each; None if alignment is not measured.
        device: device of the run; see :func:`twoview.evaluation.moments.device_of_float64`.
        moments: moments of these rows, if they are known already; None to compute them.

    Returns:
        * ``alignment`` and ``uniformity`` (Wang & Isola 2020), ``effective_rank`` (RankMe) and ``feature_std``
          (SimSiam): see :mod:`twoview.metrics`. Effective ranks are comparable between runs of one method only;
        * ``effective_rank_rows``: number of rows from which ``effective_rank`` is computed;
        * ``similarity``: mean cosine similarity of different images, in [-1, 1];
        * ``spread``: root mean square distance of the features from their mean, divided by their root mean square
          length, in [0, 1];
        * ``spectrum``: shares of the variance along the principal directions, decreasing, at most 512 values;
        * ``participation_ratio``: 1 / sum(p_i^2) for the shares p_i of all principal directions. It is k if the
          variance is distributed equally over k directions;
        * ``spectrum_decay``: exponent a of the fit p_i ~ i^-a (alpha-ReQ, Agrawal et al. 2022, arXiv:2202.05808). The
          fit is least squares of logarithms with weights 1 / i (Stringer et al. 2019). It begins at i = 3 and ends at
          half the number of nonzero shares; None if this range has fewer than 3 values;
        * ``dead``: number of dimensions whose standard deviation is at most 1e-4 of the mean standard deviation;
        * ``width``: F;
        * ``diagnosis`` and ``words``: see :func:`diagnose`.
    """
    rows = features[fixed_sample(len(features), ROWS)]
    rows = rows.float() / 255 if rows.dtype == torch.uint8 else rows
    moments = feature_moments(rows, device) if moments is None else moments
    n, width = rows.shape
    deviation = moments.variance.sqrt().cpu()
    # The Gram matrix of the rows, if the effective rank is estimated from all of them.
    gram = moments.gram() if metrics.GRAM_ROWS < n <= 10 * width and n >= width else None
    variances = torch.linalg.eigvalsh(moments.products / n).flip(0).clamp(min=0).cpu()
    total = float(variances.sum())
    length = (total + float(moments.mean.square().sum())) ** 0.5
    spread = total**0.5 / length if length else 0.0
    varies = spread > 1e-6  # constant features differ by rounding only
    shares = variances / total if varies else torch.zeros_like(variances)
    few = rows[:2048]
    found = {
        "alignment": None if pairs is None else metrics.alignment(*pairs),
        "uniformity": metrics.uniformity(few),
        "effective_rank": metrics.effective_rank(rows[: 10 * width], gram),
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
    """Diagnose collapse from the metrics of :func:`geometry_figures`.

    * "collapsed": the spread is below 0.01, or the participation ratio is below 1.5;
    * "partly collapsed": the participation ratio is below 3.5, or more than half of the dimensions are dead;
    * "healthy": otherwise.

    The participation ratio is ignored if the effective rank is at least max(8, width / 4). In that case one direction
    has much more variance than many others, which is not a collapse.

    Args:
        figures: the metrics, without ``diagnosis`` and ``words``.

    Returns:
        ``diagnosis``, and ``words``, one sentence that explains it.
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
    # polyfit multiplies residuals by w before squaring: the square root of the weight 1 / rank.
    return -float(np.polyfit(np.log(ranks), np.log(shares[ranks - 1]), 1, w=ranks**-0.5)[0])
