"""What is measured of features, and by which rules."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from twoview.errors import UserError

PARTS = (
    "linear",
    "linear_without_bn",
    "linear_sgd",
    "knn",
    "few_labels",
    "retrieval",
    "clustering",
    "geometry",
    "invariance",
    "integrity",
)
PROBES = ("linear", "linear_without_bn", "linear_sgd", "knn")


@dataclass(frozen=True)
class Protocol:
    """How features are judged.

    Args:
        parts: what is measured, of ``PARTS``.
        holdout: share of the training labels that every choice is made on, in (0, 1).
        l2: strengths of the linear probe's L2 penalty, relative to the mean cross-entropy.
        max_iterations: of L-BFGS; whether it converged is reported.
        label_smoothing: of ``linear`` and ``linear_without_bn``, in [0, 1).
        class_weights: "balanced" weighs each class alike, however many images it has, in the fits of these and in the
            choices of these and of ``knn``.
        k: numbers of neighbours.
        temperature: of the neighbours' votes.
        labels_per_class: numbers of labelled images a class that few-label probes are fitted on.
        label_shares: shares of the training labels that they are fitted on, in (0, 1).
        draws: few-label splits of each size; the same for every run on the same labels.
        few_label_l2: their penalty, which so few labels leave nothing to choose on.
        retrieval: "leave_one_out" looks each test image up among the other test images, "gallery" among the training
            images.
        ranks: numbers of results that recall and precision look at.
        shift_images: test images that are augmented to see what features ignore.
        sgd_lr: learning rates of ``linear_sgd`` for a batch of 256, all trained together.
        sgd_epochs: its epochs.
        sgd_batch_size: its images a step.
        bootstrap: resamples of the test images for 95 % intervals.
        map: how the report draws features in two dimensions, "pca" or "umap" (an extra).
        baselines: judge random initialisation and raw pixels beside the trained features.
        cache: folder in which features are kept for the next evaluation; None for not at all.

    Raises:
        UserError: a value out of range.
    """

    parts: Sequence[str] = ("linear", "knn", "geometry")
    holdout: float = 0.2
    l2: Sequence[float] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
    max_iterations: int = 1000
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    k: Sequence[int] = (1, 5, 10, 20, 50, 200)
    temperature: Sequence[float] = (0.02, 0.07, 0.2)
    labels_per_class: Sequence[int] = (1, 5, 10)
    label_shares: Sequence[float] = (0.01, 0.1)
    draws: int = 5
    few_label_l2: float = 0.1
    retrieval: Literal["leave_one_out", "gallery"] = "leave_one_out"
    ranks: Sequence[int] = (1, 5, 10)
    shift_images: int = 2000
    sgd_lr: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 30.0)
    sgd_epochs: int = 100
    sgd_batch_size: int = 256
    bootstrap: int = 2000
    map: Literal["pca", "umap"] = "pca"
    baselines: bool = True
    cache: str | None = None

    def __post_init__(self) -> None:
        for knob, values, choices in (
            ("parts", self.parts, PARTS),
            ("class_weights", [self.class_weights], ("none", "balanced")),
            ("retrieval", [self.retrieval], ("leave_one_out", "gallery")),
            ("map", [self.map], ("pca", "umap")),
        ):
            for value in values:
                if value not in choices:
                    raise UserError(f"eval.{knob}={value}: choose from {', '.join(choices)}")
        if not self.parts:
            raise UserError(f"eval.parts=[]: choose one or more of {', '.join(PARTS)}")
        if self.map == "umap" and importlib.util.find_spec("umap") is None:
            raise UserError('eval.map=umap: is not installed; pip install "twoview[umap]"')
        if not 0 < self.holdout < 1:
            raise UserError(f"eval.holdout={self.holdout}: give a share of the training labels between 0 and 1")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"eval.label_smoothing={self.label_smoothing}: give a number from 0 to below 1")
        if not self.few_label_l2 > 0:
            raise UserError(f"eval.few_label_l2={self.few_label_l2}: give a number above 0")
        for knob, least in (
            ("max_iterations", 1),
            ("draws", 2),
            ("shift_images", 2),
            ("sgd_epochs", 1),
            ("sgd_batch_size", 1),
            ("bootstrap", 100),
        ):
            if getattr(self, knob) < least:
                raise UserError(f"eval.{knob}={getattr(self, knob)}: must be at least {least}")
        for knob in ("l2", "k", "temperature", "labels_per_class", "label_shares", "ranks", "sgd_lr"):
            values = getattr(self, knob)
            if not values or not all(isinstance(v, int | float) and v > 0 for v in values):
                raise UserError(f"eval.{knob}={list(values)}: give one or more numbers above 0")
        if max(self.label_shares) >= 1:
            raise UserError(f"eval.label_shares={list(self.label_shares)}: give shares between 0 and 1")
