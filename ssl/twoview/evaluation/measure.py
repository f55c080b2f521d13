"""Interface of a measure of features: choose without test labels, then score with test labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twoview.augment import TwoViews
from twoview.data import Images, split_holdout
from twoview.encoder import Encoder
from twoview.evaluation.logistic import feature_scale
from twoview.evaluation.projection import Projection
from twoview.evaluation.tables import Table

Figures = dict[str, Any]  # metrics by name, plain values as in a report
ByName = Mapping[str, Any]


class Labelled(NamedTuple):
    """Features fp32 ``[N, F]`` and labels int64 ``[N]`` of the same images."""

    features: Tensor
    labels: Tensor

    def at(self, positions: Tensor) -> "Labelled":
        """Return the rows at the given positions, int64 ``[M]``."""
        return Labelled(self.features[positions], self.labels[positions])


class Thumbnails(NamedTuple):
    """Small center squares of images, uint8 ``[N, C, s, s]`` with s <= 32, and a hash of each whole image."""

    pixels: Tensor
    hashes: list[bytes]


class Workload(NamedTuple):
    """Sizes of an evaluation and speeds of the machine, from which durations are estimated.

    Attributes:
        train: number of training images.
        test: number of test images.
        width: number of features F.
        classes: number of classes.
        image_seconds: seconds of the network per image; 0 for raw pixels.
        operation_seconds: seconds of a floating-point operation in a matrix product in fp32.
    """

    train: int
    test: int
    width: int
    classes: int
    image_seconds: float
    operation_seconds: float

    def search(self, bank: int, queries: int) -> float:
        """Seconds of a search for neighbors; to select one costs as much as about 200 operations of a product."""
        return bank * queries * (2 * self.width + 200) * self.operation_seconds

    def fit(self, images: int) -> float:
        """Seconds of a linear classifier that is fitted by 100 passes over the features of the images."""
        return 100 * images * 4 * self.width * self.classes * self.operation_seconds


@dataclass(frozen=True)
class Inputs:
    """Everything that a measure may use before the test labels are read; it contains no test labels.

    Attributes:
        name: "trained", "random initialization" or "raw pixels".
        encoder: the network, with BatchNorm folded into convolutions; None for raw pixels.
        train: features and labels of the training images.
        test: fp32 ``[T, F]`` features of the test images.
        train_images: the training images.
        test_images: the test images; all of their labels are -1.
        pretrain_images: the pretraining images; None if they are the same as ``train_images``.
        views: augmentation for which alignment is measured.
        thumbnails: small copies of the images of each split, "train" and "test"; empty if no measure needs thumbnails
            and there are no baselines.
        classes: number of classes C.
        holdout: share of the training labels on which every choice is made, in (0, 1).
        bootstrap: number of bootstrap resamples of the test images for intervals.
        seed: seed of all random draws except the held-out split.
        split_seed: seed of the held-out split.
        device: device of the network.
        batch_size: number of images per forward pass.
        projection: projection of raw pixels from which the features are computed; None without a projection.
    """

    name: str
    encoder: Encoder | None
    train: Labelled
    test: Tensor
    train_images: Images
    test_images: Images
    pretrain_images: Images | None
    views: TwoViews
    thumbnails: Mapping[str, Thumbnails]
    classes: int
    holdout: float
    bootstrap: int
    seed: int
    split_seed: int
    device: torch.device
    batch_size: int
    projection: Projection | None = None

    def split(self) -> tuple[Tensor, Tensor]:
        """Positions of the training images to fit on, and of those held out, int64; see :func:`split_holdout`."""
        return split_holdout(self.train.labels, self.holdout, self.split_seed)

    def scale(self, features: Tensor, per_feature: bool = True) -> Tensor:
        """Numbers by which linear probes divide features ``[N, F]``, fp32 ``[F]``.

        See :func:`twoview.evaluation.logistic.feature_scale`. Projected pixels are all divided by the number that
        :class:`twoview.evaluation.projection.Projection` describes.
        """
        if self.projection is None:
            return feature_scale(features, per_feature)
        return features.new_full(features.shape[1:], self.projection.scale)


class Measure:
    """Base class of measures. A measure is a frozen dataclass whose fields are its knobs.

    :meth:`choose` computes everything that needs no test labels: hyperparameters, predictions, features of augmented
    images. :meth:`score` compares the result of ``choose`` with the test labels and chooses nothing. A measure whose
    ``choose`` returns a :class:`twoview.evaluation.probe.Prediction` needs no ``score``: its accuracy is computed by
    :func:`twoview.evaluation.probe.score`.
    """

    uses_thumbnails = False  # whether choose() needs Inputs.thumbnails

    @property
    def name(self) -> str:
        """Name of the measure in ``eval.parts`` and in reports."""
        raise NotImplementedError

    @property
    def probe_title(self) -> str:
        """Row title in the table of accuracies; empty for measures that do not predict classes."""
        return ""

    def applies(self, inputs: Inputs) -> bool:
        """Return whether the measure is defined for a network or baseline; by default it is.

        Args:
            inputs: features and images of the network or baseline.
        """
        return True

    def choose(self, inputs: Inputs, earlier: ByName) -> Any:
        """Compute everything that needs no test labels; by default nothing.

        Args:
            inputs: features and images.
            earlier: results of ``choose`` of the measures taken before this one, by name of the measure.

        Returns:
            The argument ``chosen`` of :meth:`score`, or a :class:`twoview.evaluation.probe.Prediction`.
        """
        return None

    def score(self, chosen: Any, inputs: Inputs, labels: Tensor) -> Figures:
        """Compute the metrics for the report; by default, the result of :meth:`choose` is returned as a dictionary.

        The default is for measures that need no labels.

        Args:
            chosen: result of :meth:`choose`.
            inputs: features and images.
            labels: int64 ``[T]``, labels of the test images.

        Returns:
            Metrics by name. A metric is a plain value, a list or a dictionary, and None if it is not defined.
        """
        return dict(chosen)

    def expected_seconds(self, work: Workload) -> float:
        """Return about how long the measure takes, for the announcement of the evaluation.

        By default, a measure that predicts classes fits a linear classifier to all training images, and any other
        measure takes no time.

        Args:
            work: sizes of the evaluation and speeds of the machine.
        """
        return work.fit(work.train) if self.probe_title else 0.0

    def table(self, columns: ByName, report: ByName) -> Table | None:
        """Return a table of the metrics; by default, there is no table.

        Args:
            columns: result of :meth:`score` by name of the network or baseline, as in the report.
            report: the whole report.

        Returns:
            The table, or None for no table.
        """
        return None
