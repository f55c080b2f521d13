"""Linear probe: logistic regression on frozen features."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from twoview.data import split_holdout
from twoview.errors import require, require_at_least, require_choice, require_positive
from twoview.evaluation import probe
from twoview.evaluation.logistic import fit_linear
from twoview.evaluation.logistic_blocks import Regression
from twoview.evaluation.measure import ByName, Inputs, Labelled, Measure, Workload
from twoview.evaluation.probe import Prediction
from twoview.evaluation.tables import Table, percent

log = logging.getLogger(__name__)

CHOICE_TOLERANCE = 1e-3  # as TOLERANCE of logistic_blocks, for fits that are only compared


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
        batch_norm: divide each feature by its own standard deviation; False divides all features by one number. Raw
            pixels that are projected are divided by one number in both cases, see :meth:`Inputs.scale`.
        l2_images: number of training images on which all penalties are compared, at least 1. If there are more beside
            the held-out images, by at least the number of classes, a part of them is drawn, with the same shares of the
            classes if it has at least one image of each. The best penalty of the part is compared with its neighbors on
            all of these images.

    Raises:
        UserError: if a value is out of range.
    """

    l2: Sequence[float] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
    max_iterations: int = 1000
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    batch_norm: bool = True
    l2_images: int = 20_000

    def __post_init__(self) -> None:
        require_positive("eval", l2=self.l2)
        require_at_least("eval", 1, max_iterations=self.max_iterations, l2_images=self.l2_images)
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

    def applies(self, inputs: Inputs) -> bool:
        """Return False for raw pixels without batch_norm: pixels have nearly equal standard deviations."""
        return self.batch_norm or inputs.name != "raw pixels"

    def choose(self, inputs: Inputs, earlier: ByName) -> Prediction:
        """Choose the penalty on held-out labels, fit on all training labels, and classify the test images."""
        grid = sorted(self.l2, reverse=True)  # of equally accurate penalties, the strongest is chosen
        # A part can be stratified if the rest has at least as many images as there are classes.
        few = len(inputs.split()[0]) < self.l2_images + inputs.classes
        fit = self._fit_few if few else self._fit_many
        found, chosen = fit(inputs, grid)
        return probe.linear_prediction(found, inputs.test, chosen)

    def expected_seconds(self, work: Workload) -> float:
        """See :class:`Measure`."""
        if work.train <= self.l2_images:
            return work.fit(work.train)
        return work.fit(self.l2_images) + work.fit(work.train) / 2  # half as many passes over all images (measured)

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

    def _fit_few(self, inputs: Inputs, grid: Sequence[float]) -> tuple[Tensor, dict[str, Any]]:
        """Compare the penalties on all fitted images, all together."""
        fitted, held_out = inputs.split()

        def fit(images: Labelled, l2: Sequence[float]) -> tuple[Tensor, bool]:
            images = _on_device(images, inputs.device)
            scale, weights = self._scale_and_weights(images, inputs)
            limits = (self.max_iterations, inputs.classes)
            probes, converged = fit_linear(*images, l2, *limits, scale, weights, self.label_smoothing)
            return probes.cpu(), converged

        train = inputs.train
        probes, _ = fit(train.at(fitted), grid)
        best, val_top1 = self._best(probes, train, held_out)
        probes, converged = fit(train, grid[best : best + 1])
        return probes[0], {"val_top1": val_top1, "l2": grid[best], "converged": converged}

    def _fit_many(self, inputs: Inputs, grid: Sequence[float]) -> tuple[Tensor, dict[str, Any]]:
        """Compare the penalties on a part of the fitted images, then the best and its neighbors on all of them."""
        train, (fitted, held_out) = inputs.train, inputs.split()
        message = "%s: the L2 penalty is chosen on %s of %s images, then compared with its neighbors on all"
        log.info(message, self.probe_title, self.l2_images, len(fitted))
        # scikit-learn rounds the number of images of a share up.
        share = (self.l2_images - 0.5) / len(fitted)
        part = fitted[split_holdout(train.labels[fitted], share, inputs.seed, "eval.l2_images")[1]]
        problem = self._regression(train.at(part), inputs)
        probes: list[Tensor] = []
        for l2 in grid:
            probes.append(problem.fit(l2, probes[-1] if probes else None, self.max_iterations, CHOICE_TOLERANCE)[0])
        best, _ = self._best(probes, train, held_out)
        # The best penalty depends on the number of images.
        # Of many images, the principal directions of a part are nearly those of all images.
        basis = problem.basis if len(part) >= 4 * len(problem.basis) else None
        problem, start = self._regression(train, inputs, basis), probes[best]
        found: dict[int, Tensor] = {}
        while True:
            for i in (best, best - 1, best + 1):
                if i in range(len(grid)) and i not in found:
                    found[i], _ = problem.fit(grid[i], start, self.max_iterations, CHOICE_TOLERANCE, fitted)
                    start = found[best]
            order = sorted(found)
            place, val_top1 = self._best([found[i] for i in order], train, held_out)
            if order[place] == best:
                break
            best = order[place]
        final, converged = problem.fit(grid[best], found[best], self.max_iterations)
        return final, {"val_top1": val_top1, "l2": grid[best], "converged": converged}

    def _best(self, probes: Iterable[Tensor], train: Labelled, held_out: Tensor) -> tuple[int, float]:
        predicted = [probe.linear_classes(one, train.features, held_out) for one in probes]
        return probe.choose_best(predicted, train.labels[held_out], self.class_weights)

    def _regression(self, images: Labelled, inputs: Inputs, basis: Tensor | None = None) -> Regression:
        images = _on_device(images, inputs.device)
        scale, weights = self._scale_and_weights(images, inputs)
        smoothing, device = self.label_smoothing, inputs.device
        return Regression(*images, scale, inputs.classes, weights, smoothing, device, basis=basis)

    def _scale_and_weights(self, images: Labelled, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        scale = inputs.scale(images.features, self.batch_norm)
        if self.class_weights == "none":
            return scale, None
        counts = images.labels.bincount(minlength=inputs.classes)
        return scale, len(images.labels) / ((counts > 0).sum() * counts.clamp(min=1))


def _on_device(images: Labelled, device: torch.device) -> Labelled:
    """Images on a CUDA device if half of its free memory holds their features; otherwise the images as they are."""
    if device.type == "cuda" and 4 * images.features.numel() < torch.cuda.mem_get_info(device)[0] / 2:
        return Labelled(*(x.to(device) for x in images))
    return images
