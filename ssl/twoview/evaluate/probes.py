"""Linear probes and kNN on fixed features; every choice is made on a held-out part of the training labels."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from twoview.data import split_labels
from twoview.errors import UserError
from twoview.evaluate.protocol import Protocol
from twoview.metrics import knn_neighbours, knn_vote

log = logging.getLogger(__name__)

LEAST_VARIANCE = 1e-7  # of a direction, relative to the greatest


class Labelled(NamedTuple):
    """Images by their features, fp32 ``[N, F]``, and labels, int64 ``[N]``."""

    features: Tensor
    labels: Tensor

    def at(self, positions: Tensor) -> "Labelled":
        """Those at some positions."""
        return Labelled(self.features[positions], self.labels[positions])


class Prediction(NamedTuple):
    """What a probe says of the test images, before their labels are read.

    ``classes`` is int64 ``[T]``, ``chosen`` what was chosen and how well it did on held-out training labels. A linear
    probe has ``probabilities``, fp32 ``[T, C]``, and ``classify``, ``[N, F] -> int64 [N]`` for any features.
    """

    classes: Tensor
    chosen: dict[str, Any]
    probabilities: Tensor | None = None
    classify: Callable[[Tensor], Tensor] | None = None


def split_holdout(labels: Tensor, share: float, seed: int, knob: str = "eval.holdout") -> tuple[Tensor, Tensor]:
    """Positions to fit on and positions held out, fixed by ``seed``, each class in proportion where it has two images.

    Args:
        labels: int64 ``[N]``.
        share: held out, in (0, 1).
        seed: of the split.
        knob: that gave the share, for a message.

    Returns:
        int64 positions ``[N - h]`` and ``[h]``, ascending.
    """
    try:
        return split_labels(labels, share, seed)
    except ValueError as error:
        raise UserError(f"{knob}={share}: cannot hold out that share of {len(labels)} labels ({error})") from error


def predict(
    train: Labelled, test: Tensor, protocol: Protocol, seed: int, probes: Sequence[str], classes: int
) -> dict[str, Prediction]:
    """Choose on held-out training labels, refit on all of them, and classify the test images.

    Args:
        train: N images.
        test: ``[T, F]`` features.
        protocol: what is tried.
        seed: of the held-out split.
        probes: of "linear", "linear_without_bn" and "knn".
        classes: number of classes C.
    """
    fit, held = (train.at(part) for part in split_holdout(train.labels, protocol.holdout, seed))
    choose: Mapping[str, Callable[[], Prediction]] = {
        "linear": lambda: _linear(train, fit, held, test, protocol, classes, batch_norm=True),
        "linear_without_bn": lambda: _linear(train, fit, held, test, protocol, classes, batch_norm=False),
        "knn": lambda: _knn(train, fit, held, test, protocol, classes),
    }
    return {name: choose[name]() for name in probes}


def score(prediction: Prediction, labels: Tensor, classes: int, protocol: Protocol, seed: int) -> dict[str, Any]:
    """A prediction against the test labels.

    Args:
        prediction: of T images.
        labels: int64 ``[T]``.
        classes: number of classes.
        protocol: gives the resamples of the bootstrap.
        seed: of the bootstrap.

    Returns:
        What was chosen, and: ``test_top1`` in [0, 1] with ``interval``, its 95 % percentile interval over resampled
        test images; ``balanced``, the mean over classes of ``per_class``, the share of a class's images that is
        recognised (None for a class without test images); and of probes with probabilities ``calibration_error``, the
        mean distance of confidence from accuracy over 15 bins of confidence (Guo et al. 2017, arXiv:1706.04599).
    """
    correct = prediction.classes == labels
    counts = labels.bincount(minlength=classes)
    found = labels[correct].bincount(minlength=classes)
    result = {
        **prediction.chosen,
        "test_top1": float(correct.double().mean()),
        "interval": bootstrap(correct.double().numpy(), protocol.bootstrap, seed),
        "balanced": float((found / counts)[counts > 0].double().mean()),
        "per_class": [f / n if n else None for f, n in zip(found.tolist(), counts.tolist(), strict=True)],
    }
    if prediction.probabilities is not None:
        probabilities = F.pad(prediction.probabilities, (0, int(classes == 1)))  # torchmetrics wants two classes
        error = multiclass_calibration_error(probabilities, labels, max(classes, 2), n_bins=15, norm="l1")
        result["calibration_error"] = float(error)
    return result


def confusion(prediction: Prediction, labels: Tensor, classes: int) -> np.ndarray:
    """int64 ``[C, C]``: how many images of each class (row) were taken for each (column)."""
    table: np.ndarray = (labels * classes + prediction.classes).bincount(minlength=classes**2).numpy()
    return table.reshape(classes, classes)


def bootstrap(values: np.ndarray, resamples: int, seed: int) -> list[float]:
    """95 % percentile interval of a mean, by resampling its values, such as whether each image was recognised.

    Efron 1979, doi:10.1214/aos/1176344552.

    Args:
        values: ``[T]``.
        resamples: how many.
        seed: of the draws.
    """
    if len(values) < 2:
        return [float(values.mean())] * 2
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, batch=64, method="percentile", rng=np.random.default_rng(seed)
    )
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def few_label_splits(labels: Tensor, protocol: Protocol) -> dict[str, list[Tensor]]:
    """Positions of few labelled training images, some draws of each size; a function of the labels alone.

    Args:
        labels: int64 ``[N]``.
        protocol: gives sizes and draws. A class of fewer images gives all it has, and of a share at least one. A draw
            of a larger size holds that of a smaller one.

    Returns:
        For each size, such as "5 per class" or "1 %", int64 positions of each draw, ascending.
    """

    def drawn(draw: int, amount: int, share: float) -> Tensor:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
        parts = [order[labels[order] == c] for c in labels.unique()]
        return torch.cat([part[: max(amount, round(share * len(part)))] for part in parts]).sort().values

    sizes = {f"{amount} per class": (amount, 0.0) for amount in protocol.labels_per_class}
    sizes |= {f"{100 * share:g} %": (1, share) for share in protocol.label_shares}
    return {name: [drawn(draw, *size) for draw in range(protocol.draws)] for name, size in sizes.items()}


def few_labels(
    train: Labelled, test: Tensor, splits: Mapping[str, Sequence[Tensor]], protocol: Protocol, classes: int
) -> dict[str, list[Tensor]]:
    """Classes of the test images by linear probes that were fitted on few labels.

    Args:
        train: all say how wide a feature spreads, which needs no labels; labels are read at the splits alone.
        test: ``[T, F]`` features.
        splits: of :func:`few_label_splits`.
        protocol: gives the penalty.
        classes: number of classes.

    Returns:
        For each size int64 ``[T]`` of each draw.
    """
    scale, l2 = _deviation(train.features), [protocol.few_label_l2]

    def fitted(split: Tensor) -> Tensor:
        probes, _ = fit_linear(*train.at(split), l2, protocol.max_iterations, classes, scale)
        return _scores(probes[0], test).argmax(1)

    return {name: [fitted(split) for split in draws] for name, draws in splits.items()}


def score_few_labels(predicted: Mapping[str, Sequence[Tensor]], labels: Tensor) -> dict[str, dict[str, Any]]:
    """For each size ``mean`` accuracy over the draws, its 95 % t ``interval``, and that of each of ``draws``."""
    results = {}
    for name, draws in predicted.items():
        accuracies = np.array([_accuracy(classes, labels) for classes in draws])
        half = stats.t.ppf(0.975, len(draws) - 1) * accuracies.std(ddof=1) / np.sqrt(len(draws))
        mean = float(accuracies.mean())
        interval = [max(0.0, mean - float(half)), min(1.0, mean + float(half))]
        results[name] = {"mean": mean, "interval": interval, "draws": accuracies.tolist()}
    return results


def _linear(
    train: Labelled, fit: Labelled, held: Labelled, test: Tensor, protocol: Protocol, classes: int, batch_norm: bool
) -> Prediction:
    # Strong penalties first: of a tie, the strongest is kept.
    grid = sorted(protocol.l2, reverse=True)

    def fitted(images: Labelled, l2: Sequence[float]) -> tuple[Tensor, bool]:
        scale, weights = _deviation(images.features, batch_norm), None
        if protocol.class_weights == "balanced":
            counts = images.labels.bincount(minlength=classes)
            weights = len(images.labels) / ((counts > 0).sum() * counts.clamp(min=1))
        return fit_linear(*images, l2, protocol.max_iterations, classes, scale, weights, protocol.label_smoothing)

    probes, _ = fitted(fit, grid)
    predicted = [_scores(probe, held.features).argmax(1) for probe in probes]
    best = int(np.argmax([_quality(guesses, held.labels, protocol) for guesses in predicted]))
    probes, converged = fitted(train, grid[best : best + 1])
    chosen = {"val_top1": _accuracy(predicted[best], held.labels), "l2": grid[best], "converged": converged}
    return linear_prediction(probes[0], test, chosen)


def _deviation(features: Tensor, each: bool = True) -> Tensor:
    """Deviation of each feature, or one for all, by which a penalty means the same at any scale; 1 where it is 0."""
    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = deviation.where(deviation > 1e-6 * mean.abs(), 0.0)  # constant but for rounding
    deviation = deviation if each else deviation.square().mean().sqrt().expand_as(deviation)
    return deviation.where(deviation > 0, 1.0)


def fit_linear(
    features: Tensor,
    labels: Tensor,
    l2: Sequence[float],
    max_iterations: int = 1000,
    classes: int = 0,
    scale: Tensor | None = None,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, bool]:
    """Multinomial logistic regressions on scaled features, one for each penalty, fitted together by L-BFGS.

    Each minimises mean cross-entropy + ``l2 / 2`` times the squared norm of the weights; the intercept is free. The
    problem is convex. It is solved in the directions that the images span, in coordinates in which its Hessian at zero
    weights is nearly the identity, so that tens of iterations do where plain coordinates take hundreds.

    Args:
        features: fp32 ``[N, F]``.
        labels: int64 ``[N]``, C classes numbered from 0.
        l2: P penalties.
        max_iterations: of L-BFGS.
        classes: C; 0 takes it from the labels.
        scale: fp32 ``[F]``, what features are divided by before weights are penalised; None for their deviations,
            which makes them those of a BatchNorm without parameters.
        class_weights: fp32 ``[C]``, factors of each image's cross-entropy; None for 1.
        label_smoothing: share of each label that is spread over all classes, in [0, 1).

    Returns:
        fp32 ``[P, F + 1, C]``, weights for the features as they were given with the intercept last; whether the
        iterations sufficed.
    """
    n, width = features.shape
    classes = classes or int(labels.max()) + 1
    mean = features.mean(0)
    scale = _deviation(features) if scale is None else scale
    standard = (features - mean) / scale
    # In float64: of features with many dead dimensions, LAPACK's fp32 routine may find no eigenvectors.
    small = (standard.T @ standard if n >= width else standard @ standard.T).double() / n
    variances, directions = torch.linalg.eigh(small)
    # Weights lie in the span of the images; what is below fp32's rounding is not in it.
    spanned = variances > LEAST_VARIANCE * variances.max()
    variances, directions = variances[spanned], directions[:, spanned]
    if n < width:
        directions = standard.T.double() @ directions / (n * variances).sqrt()
    variances, directions = variances.float(), directions.float()
    turned = standard @ directions
    penalties = torch.tensor(l2, dtype=torch.float32)
    # At zero weights the softmax contributes covariance / C to the Hessian.
    unit = (variances.clamp(min=0) / classes + penalties[:, None]).rsqrt()[..., None]  # [P, R, 1]
    weights = torch.zeros(len(l2), len(variances), classes, requires_grad=True)
    intercepts = torch.zeros(len(l2), 1, classes, requires_grad=True)
    limits: dict[str, Any] = {"max_iter": max_iterations, "max_eval": 2 * max_iterations}
    optimizer = torch.optim.LBFGS([weights, intercepts], **limits, tolerance_grad=1e-5, line_search_fn="strong_wolfe")
    rows = max(1, 2**24 // (len(l2) * classes))

    def loss() -> Tensor:
        optimizer.zero_grad()
        total: Tensor = (0.5 * penalties[:, None, None] * (unit * weights).square()).sum()
        total.backward()
        # One product for all penalties; its gradient is summed over the parts before it is taken further back.
        joined = (unit * weights).transpose(0, 1).flatten(1)
        matrix = joined.detach().requires_grad_()
        for x, y in zip(turned.split(rows), labels.split(rows), strict=True):
            scores = (x @ matrix).unflatten(1, (len(l2), classes)) + intercepts.transpose(0, 1)
            target, one = y.repeat_interleave(len(l2)), scores.flatten(0, 1)
            each = F.cross_entropy(one, target, reduction="none", label_smoothing=label_smoothing)
            part = (each if class_weights is None else each * class_weights[target]).sum() / n
            part.backward()
            total = total.detach() + part.detach()
        joined.backward(matrix.grad)
        return total

    optimizer.step(loss)
    state = optimizer.state[weights]
    iterations = state["n_iter"]
    converged = iterations < max_iterations and state["func_evals"] < limits["max_eval"]
    if not converged:
        log.warning("linear probe: not converged in %d iterations; raise eval.max_iterations", iterations)
    with torch.no_grad():
        slopes = (directions @ (unit * weights)) / scale[:, None]
        return torch.cat([slopes, intercepts - mean @ slopes[:, None]], dim=1), converged


def linear_prediction(probe: Tensor, test: Tensor, chosen: dict[str, Any]) -> Prediction:
    """What a linear probe ``[F + 1, C]``, the intercept last, says of features ``[T, F]``."""
    scores = _scores(probe, test)
    return Prediction(scores.argmax(1), chosen, scores.softmax(1), lambda features: _scores(probe, features).argmax(1))


def _scores(probe: Tensor, features: Tensor) -> Tensor:
    scores: Tensor = features @ probe[:-1] + probe[-1]
    return scores


def _knn(train: Labelled, fit: Labelled, held: Labelled, test: Tensor, protocol: Protocol, classes: int) -> Prediction:
    # More neighbours than there are images to vote would be the same as all of them.
    numbers = [k for k in protocol.k if k <= len(fit.labels)] or [len(fit.labels)]
    similarity, position = knn_neighbours(fit.features, held.features, max(numbers))
    grid, votes = list(itertools.product(numbers, protocol.temperature)), fit.labels[position]
    predicted = [knn_vote(similarity, votes, k, temperature, classes) for k, temperature in grid]
    best = int(np.argmax([_quality(guesses, held.labels, protocol) for guesses in predicted]))
    k, temperature = grid[best]
    similarity, position = knn_neighbours(train.features, test, k)
    guesses = knn_vote(similarity, train.labels[position], k, temperature, classes)
    return Prediction(
        guesses, {"val_top1": _accuracy(predicted[best], held.labels), "k": k, "temperature": temperature}
    )


def _quality(predicted: Tensor, labels: Tensor, protocol: Protocol) -> float:
    """What is chosen by: accuracy, or its mean over classes if they are to weigh alike."""
    if protocol.class_weights == "none":
        return _accuracy(predicted, labels)
    classes = labels.unique()
    return float(np.mean([_accuracy(predicted[labels == c], labels[labels == c]) for c in classes]))


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).double().mean())
