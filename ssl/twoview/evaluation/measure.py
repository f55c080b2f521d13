"""Interface of a measure of features: choose without test labels, then score with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twoview.augment import TwoViews
from twoview.data import Images
from twoview.encoder import Encoder
from twoview.evaluation.tables import Table

Figures = dict[str, Any]  # plain values by name, as in a report
ByName = Mapping[str, Any]


class Labelled(NamedTuple):
    """Features fp32 ``[N, F]`` and labels int64 ``[N]`` of the same images."""

    features: Tensor
    labels: Tensor

    def at(self, positions: Tensor) -> "Labelled":
        """The rows at some positions."""
        return Labelled(self.features[positions], self.labels[positions])


class Thumbnails(NamedTuple):
    """Small copies of images, uint8 ``[N, C, s, s]`` with s <= 32, and a hash of each original image."""

    pixels: Tensor
    hashes: list[bytes]


@dataclass(frozen=True)
class Inputs:
    """Everything that a measure may use before the test labels are read. Contains no test label.

    Attributes:
        name: "trained", "random initialization" or "raw pixels".
        encoder: the network; None for raw pixels.
        train: features and labels of the training images.
        test: fp32 ``[T, F]`` features of the test images.
        train_images: the training images.
        test_images: the test images; all of their labels are -1.
        pretrain_images: the images of pretraining, where they are others than ``train_images``.
        views: augmentation whose alignment is measured.
        thumbnails: small copies of the images by split, "train" and "test"; empty if no measure needs them.
        classes: number C of classes.
        holdout: share of the training labels on which every choice is made.
        bootstrap: resamples of the test images for intervals.
        seed: seed of all random draws.
        device: device that networks are computed on.
        batch_size: images at a time.
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
    device: torch.device
    batch_size: int


class Measure:
    """Base class of measures, which are frozen dataclasses of their own knobs.

    :meth:`choose` does all that needs no test label: hyperparameters, predictions, features of augmented images.
    :meth:`score` compares its result with the test labels and chooses nothing. A measure whose ``choose`` returns a
    :class:`twoview.evaluation.probe.Prediction` needs no ``score``: it is scored by its accuracy.
    """

    uses_thumbnails = False  # whether choose() needs Inputs.thumbnails

    @property
    def name(self) -> str:
        """Name in ``eval.parts`` and in reports."""
        raise NotImplementedError

    @property
    def probe_title(self) -> str:
        """Row title in the table of accuracies, of measures that predict classes; empty for others."""
        return ""

    def applies(self, inputs: Inputs) -> bool:
        """Whether this can be measured of a network or baseline."""
        return True

    def choose(self, inputs: Inputs, earlier: ByName) -> Any:
        """Everything that needs no test label.

        Args:
            inputs: features and images.
            earlier: results of this method of the measures before, by name.
        """
        return None

    def score(self, chosen: Any, inputs: Inputs, labels: Tensor) -> Figures:
        """Figures for the report; by default those that :meth:`choose` has returned, for measures without labels.

        Args:
            chosen: result of :meth:`choose`.
            inputs: features and images.
            labels: int64 ``[T]`` of the test images.
        """
        return dict(chosen)

    def table(self, columns: ByName, report: ByName) -> Table | None:
        """Table of the figures, or None.

        Args:
            columns: figures of this measure for each network, by its name.
            report: the whole report.
        """
        return None
