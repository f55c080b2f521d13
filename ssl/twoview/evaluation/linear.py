"""Linear probe: logistic regression on frozen features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from twoview.errors import require, require_at_least, require_choice, require_positive
from twoview.evaluation import probe
from twoview.evaluation.logistic import feature_scale, fit_linear
from twoview.evaluation.measure import ByName, Inputs, Labelled, Measure
from twoview.evaluation.probe import Prediction
from twoview.evaluation.tables import Table, percent


@dataclass(frozen=True)
class Linear(Measure):
    """Logistic regression on frozen features; the L2 penalty is chosen on held-out training labels.

    Source: Kornblith et al. 2019, arXiv:1805.08974, section 3.

    Args:
        l2: L2 penalties to choose from, > 0, relative to the mean cross-entropy.
        max_iterations: largest number of iterations of L-BFGS. The report states whether L-BFGS converged.
        label_smoothing: share of each label that is spread over all classes, in [0, 1).
        class_weights: "balanced" gives all classes equal weight in the fit and in the choice, "none" gives all images
            equal weight.
        batch_norm: divide each feature by its own standard deviation; False divides all features by one number.

    Raises:
        UserError: if a value is out of range.
    """

    l2: Sequence[float] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
    max_iterations: int = 1000
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    batch_norm: bool = True

    def __post_init__(self) -> None:
        require_positive("eval", l2=self.l2)
        require_at_least("eval", 1, max_iterations=self.max_iterations)
        require_choice("eval", ("none", "balanced"), class_weights=self.class_weights)
        require(0 <= self.label_smoothing < 1, f"eval.label_smoothing={self.label_smoothing}: must lie in [0, 1)")

    @property
    def name(self) -> str:
        """See :class:`Measure`."""
        return "linear" if self.batch_norm else "linear_without_bn"

    @property
    def probe_title(self) -> str:
        """See :class:`Measure`."""
        return "linear probe" if self.batch_norm else "linear, no BatchNorm"

    def choose(self, inputs: Inputs, earlier: ByName) -> Prediction:
        """Choose the penalty on held-out labels, fit on all training labels, and classify the test images."""
        train = inputs.train
        fitted, held_out = (train.at(part) for part in inputs.split())
        grid = sorted(self.l2, reverse=True)  # of equally accurate penalties, the strongest is chosen
        probes, _ = self._fit(fitted, grid, inputs.classes)
        predicted = [probe.linear_scores(one, held_out.features).argmax(1) for one in probes]
        best, val_top1 = probe.choose_best(predicted, held_out.labels, self.class_weights)
        probes, converged = self._fit(train, grid[best : best + 1], inputs.classes)
        chosen = {"val_top1": val_top1, "l2": grid[best], "converged": converged}
        return probe.linear_prediction(probes[0], inputs.test, chosen)

    def table(self, columns: ByName, report: ByName) -> Table | None:
        """Return a table of the accuracy for each class, for the trained network only."""
        if not self.batch_norm:
            return None
        shares = next(iter(columns.values()))["per_class"]
        rows = [
            [name, "no test image" if share is None else percent(share)]
            for name, share in zip(report["classes"], shares, strict=True)
        ]
        return Table("Classes", ["class", "recognized by the linear probe"], rows)

    def _fit(self, images: Labelled, l2: Sequence[float], classes: int) -> tuple[Tensor, bool]:
        scale, weights = feature_scale(images.features, self.batch_norm), None
        if self.class_weights == "balanced":
            counts = images.labels.bincount(minlength=classes)
            weights = len(images.labels) / ((counts > 0).sum() * counts.clamp(min=1))
        return fit_linear(*images, l2, self.max_iterations, classes, scale, weights, self.label_smoothing)
