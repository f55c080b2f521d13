"""Predictions of probes and their scores."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

BLOCK = 2**24  # largest number of features and class scores that are processed at once


class Prediction(NamedTuple):
    """Predictions of a probe for the test images, made before their labels are read.

    Attributes:
        classes: int64 ``[T]``, predicted classes.
        chosen: chosen hyperparameters, and "val_top1", their accuracy on held-out training labels.
        probabilities: fp32 ``[T, C]``, predicted probabilities; None for probes without probabilities.
        classify: function that maps features fp32 ``[N, F]`` to classes int64 ``[N]``; None except for linear probes.
        neighbors: int64 ``[T, K]``, positions of the most similar training images of each test image, in decreasing
            order; None except for kNN.
    """

    classes: Tensor
    chosen: dict[str, Any]
    probabilities: Tensor | None = None
    classify: Callable[[Tensor], Tensor] | None = None
    neighbors: Tensor | None = None


def score(prediction: Prediction, labels: Tensor, classes: int, resamples: int, seed: int) -> dict[str, Any]:
    """Compare a prediction with the test labels.

    Args:
        prediction: predictions for T images.
        labels: int64 ``[T]``, labels of the test images.
        classes: number of classes.
        resamples: number of resamples of the bootstrap.
        seed: seed of the bootstrap.

    Returns:
        The entries of ``prediction.chosen``, and:

        * ``test_top1``: accuracy, in [0, 1];
        * ``interval``: 95 % percentile bootstrap interval of the accuracy over the test images;
        * ``per_class``: accuracy for each class, None for a class without test images;
        * ``balanced_accuracy``: mean of ``per_class``, in [0, 1];
        * ``calibration_error``, for predictions with probabilities: expected calibration error, the mean absolute
          difference between confidence and accuracy over 15 bins of confidence, weighted by the number of images (Guo
          et al. 2017, arXiv:1706.04599).
    """
    correct = prediction.classes == labels
    counts = labels.bincount(minlength=classes)
    found = labels[correct].bincount(minlength=classes)
    result = {
        **prediction.chosen,
        "test_top1": float(correct.double().mean()),
        "interval": bootstrap(correct.double().numpy(), resamples, seed),
        "balanced_accuracy": float((found / counts)[counts > 0].double().mean()),
        "per_class": [f / n if n else None for f, n in zip(found.tolist(), counts.tolist(), strict=True)],
    }
    if prediction.probabilities is not None:
        probabilities = F.pad(prediction.probabilities, (0, int(classes == 1)))  # torchmetrics needs two classes
        error = multiclass_calibration_error(probabilities, labels, max(classes, 2), n_bins=15, norm="l1")
        result["calibration_error"] = float(error)
    return result


def confusion(prediction: Prediction, labels: Tensor, classes: int) -> np.ndarray:
    """Compute the confusion matrix.

    Args:
        prediction: predictions for T images.
        labels: int64 ``[T]``.
        classes: number of classes C.

    Returns:
        int64 ``[C, C]``, number of images for each class (row) and predicted class (column).
    """
    table: np.ndarray = (labels * classes + prediction.classes).bincount(minlength=classes**2).numpy()
    return table.reshape(classes, classes)


def bootstrap(values: np.ndarray, resamples: int, seed: int) -> list[float]:
    """Compute the 95 % percentile bootstrap interval of a mean.

    Source: Efron 1979, doi:10.1214/aos/1176344552.

    Args:
        values: float64 ``[T]``, values whose mean is taken, such as 1 for a correct and 0 for a wrong prediction.
        resamples: number of resamples.
        seed: seed of the resamples.

    Returns:
        Lower and upper end of the interval; both are the value itself if T is 1.
    """
    if len(values) < 2:
        return [float(values.mean())] * 2
    rng = np.random.default_rng(seed)
    found = stats.bootstrap((values,), np.mean, n_resamples=resamples, batch=64, method="percentile", rng=rng)
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Compute the share of correct predictions.

    Args:
        predicted: int64 ``[N]``, predicted classes.
        labels: int64 ``[N]``, true classes.

    Returns:
        A number in [0, 1]; nan if N is 0.
    """
    return float((predicted == labels).double().mean())


def choose_best(predicted: Sequence[Tensor], labels: Tensor, class_weights: str) -> tuple[int, float]:
    """Choose hyperparameters by their predictions for held-out images.

    Args:
        predicted: predicted classes int64 ``[N]`` for each candidate set of hyperparameters. Of equally good
            candidates, the first is chosen.
        labels: int64 ``[N]``, labels of the held-out images.
        class_weights: "none" to choose by accuracy, "balanced" to choose by the mean of the accuracies of the classes.

    Returns:
        Position of the chosen candidate in ``predicted``, and its accuracy in [0, 1].
    """
    groups = [labels == c for c in labels.unique()] if class_weights == "balanced" else [labels >= 0]
    scores = [np.mean([accuracy(guesses[group], labels[group]) for group in groups]) for guesses in predicted]
    best = int(np.argmax(scores))
    return best, accuracy(predicted[best], labels)


def describe_choice(result: Mapping[str, Any]) -> str:
    """Return a short text that lists the chosen hyperparameters of a result."""
    titles = {"l2": "L2", "lr": "learning rate", "k": "k", "temperature": "T"}
    return ", ".join(f"{title} {result[name]:g}" for name, title in titles.items() if name in result)


def linear_prediction(probe: Tensor, test: Tensor, chosen: dict[str, Any]) -> Prediction:
    """Classify test images by a linear probe.

    Args:
        probe: fp32 ``[F + 1, C]``, weights with the intercept in the last row.
        test: fp32 ``[T, F]``, features of the test images.
        chosen: see :class:`Prediction`.
    """
    parts = test.split(max(1, BLOCK // sum(probe.shape)))
    probabilities = torch.empty(len(test), probe.shape[1])
    classes, row = [], 0
    for part in parts:
        scores = linear_scores(probe, part)
        classes.append(scores.argmax(1))
        probabilities[row : row + len(part)] = scores.softmax(1)
        row += len(part)
    return Prediction(torch.cat(classes), chosen, probabilities, lambda x: linear_scores(probe, x).argmax(1))


def linear_classes(probe: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Classify some images by a linear probe, in blocks, so that features in a file are not copied to memory.

    Args:
        probe: fp32 ``[F + 1, C]``, weights with the intercept in the last row.
        features: fp32 ``[N, F]``.
        positions: int64 ``[M]``, positions of the images in ``features``.

    Returns:
        int64 ``[M]``, predicted classes.
    """
    parts = positions.split(max(1, BLOCK // sum(probe.shape)))
    return torch.cat([linear_scores(probe, features[part]).argmax(1) for part in parts])


def linear_scores(probe: Tensor, features: Tensor) -> Tensor:
    """Compute the class scores ``[N, C]`` of a linear probe ``[F + 1, C]`` for features ``[N, F]``."""
    return features @ probe[:-1] + probe[-1]
