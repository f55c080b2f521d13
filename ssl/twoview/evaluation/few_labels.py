"""Linear probes on few labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from twoview.errors import require, require_at_least, require_positive
from twoview.evaluation.logistic import fit_linear
from twoview.evaluation.measure import ByName, Figures, Inputs, Measure, Workload
from twoview.evaluation.probe import accuracy, linear_scores
from twoview.evaluation.progress import track
from twoview.evaluation.tables import Table, side_by_side, with_interval


class FewLabelPredictions(NamedTuple):
    """Predictions of probes on few labels.

    Attributes:
        splits: int64 positions of the labeled training images of each draw, by size.
        predictions: int64 ``[T]`` predicted classes of the test images for each draw, by size.
    """

    splits: Mapping[str, Sequence[Tensor]]
    predictions: Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class FewLabels(Measure):
    """Linear probes fitted on few labeled training images, for several random draws of each size.

    The penalty is fixed, since there are too few labels to hold any out.

    Args:
        labels_per_class: sizes given as numbers of labeled images per class, > 0.
        label_shares: sizes given as shares of the training labels, in (0, 1).
        draws: number of random draws of each size, at least 2; the draws are the same for all runs on the same labels.
        few_label_l2: L2 penalty, > 0.
        max_iterations: largest number of iterations of L-BFGS.

    Raises:
        UserError: if a value is out of range.
    """

    name = "few_labels"

    labels_per_class: Sequence[int] = (1, 5, 10)
    label_shares: Sequence[float] = (0.01, 0.1)
    draws: int = 5
    few_label_l2: float = 0.1
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        require_positive("eval", labels_per_class=self.labels_per_class, label_shares=self.label_shares)
        require_at_least("eval", 2, draws=self.draws)
        require_at_least("eval", 1, max_iterations=self.max_iterations)
        require(max(self.label_shares) < 1, f"eval.label_shares={list(self.label_shares)}: give shares between 0 and 1")
        require(self.few_label_l2 > 0, f"eval.few_label_l2={self.few_label_l2}: give a number above 0")

    def choose(self, inputs: Inputs, earlier: ByName) -> FewLabelPredictions:
        """Fit a probe on each split and classify the test images."""
        # The scale of the features needs no labels, so it is computed from all training images.
        scale, l2 = inputs.scale(inputs.train.features), [self.few_label_l2]

        def predicted(split: Tensor) -> Tensor:
            probes, _ = fit_linear(*inputs.train.at(split), l2, self.max_iterations, inputs.classes, scale)
            # In blocks, since scores are [T, C].
            return torch.cat([linear_scores(probes[0], x).argmax(1) for x in inputs.test.split(8192)])

        splits = few_label_splits(inputs.train.labels, self)
        every = track([(name, split) for name, draws in splits.items() for split in draws])
        predictions: dict[str, list[Tensor]] = {name: [] for name in splits}
        for name, split in every:
            predictions[name].append(predicted(split))
        return FewLabelPredictions(splits, predictions)

    def score(self, chosen: FewLabelPredictions, inputs: Inputs, labels: Tensor) -> Figures:
        """Return for each size the ``mean`` accuracy, its 95 % t ``interval``, and the accuracies of all ``draws``."""
        results = {}
        for name, draws in chosen.predictions.items():
            accuracies = np.array([accuracy(classes, labels) for classes in draws])
            half = stats.t.ppf(0.975, len(draws) - 1) * accuracies.std(ddof=1) / np.sqrt(len(draws))
            mean = float(accuracies.mean())
            interval = [max(0.0, mean - float(half)), min(1.0, mean + float(half))]
            results[name] = {"mean": mean, "interval": interval, "draws": accuracies.tolist()}
        return results

    def expected_seconds(self, work: Workload) -> float:
        """See :class:`Measure`."""
        images = sum(self.labels_per_class) * work.classes + sum(self.label_shares) * work.train
        return self.draws * work.fit(int(images))

    def table(self, columns: ByName, report: ByName) -> Table:
        """Return a table of the mean accuracy for each size."""
        cells = {
            column: {size: with_interval(x["mean"], x["interval"]) for size, x in figures.items()}
            for column, figures in columns.items()
        }
        note = "Linear probe on few labelled training images; mean over draws and its 95 % interval."
        return side_by_side("Few labels", cells, note)


def few_label_splits(labels: Tensor, settings: FewLabels) -> dict[str, list[Tensor]]:
    """Draw the positions of few labeled training images.

    The draws depend only on the labels and the settings. A class with fewer images than requested contributes all its
    images. A share contributes at least one image of each class. For each class, the images of a smaller size are among
    the images of a larger size in the same draw.

    Args:
        labels: int64 ``[N]``.
        settings: sizes and number of draws.

    Returns:
        int64 positions of each draw, ascending, by size such as "5 per class" or "1 %".
    """

    def drawn(draw: int, amount: int, share: float) -> Tensor:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
        parts = [order[labels[order] == c] for c in labels.unique()]
        return torch.cat([part[: max(amount, round(share * len(part)))] for part in parts]).sort().values

    sizes = {f"{amount} per class": (amount, 0.0) for amount in settings.labels_per_class}
    sizes |= {f"{100 * share:g} %": (1, share) for share in settings.label_shares}
    return {name: [drawn(draw, *size) for draw in range(settings.draws)] for name, size in sizes.items()}
