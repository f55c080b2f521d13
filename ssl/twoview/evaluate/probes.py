"""Linear probe and kNN on fixed features; every choice is made on a held-out part of the training labels."""

import itertools
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from twoview.errors import UserError
from twoview.metrics import knn_neighbours, knn_vote

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """How features are judged.

    Args:
        holdout: share of the training labels that every choice is made on, in (0, 1).
        l2: strengths of the linear probe's L2 penalty, relative to the mean cross-entropy.
        max_iterations: of L-BFGS; whether it converged is reported.
        k: numbers of neighbours.
        temperature: of the neighbours' votes.
        baselines: judge random initialisation and raw pixels beside the trained features.

    Raises:
        UserError: a value out of range.
    """

    holdout: float = 0.2
    l2: Sequence[float] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
    max_iterations: int = 1000
    k: Sequence[int] = (1, 5, 10, 20, 50, 200)
    temperature: Sequence[float] = (0.02, 0.07, 0.2)
    baselines: bool = field(default=True)

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise UserError(f"eval.holdout={self.holdout}: give a share of the training labels between 0 and 1")
        if self.max_iterations < 1:
            raise UserError(f"eval.max_iterations={self.max_iterations}: must be at least 1")
        for knob in ("l2", "k", "temperature"):
            values = getattr(self, knob)
            if not values or not all(isinstance(v, int | float) and v > 0 for v in values):
                raise UserError(f"eval.{knob}={list(values)}: give one or more numbers above 0")


def split_holdout(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to fit on and positions held out, fixed by ``seed``, each class in proportion where it has two images.

    Args:
        labels: int64 ``[N]``.
        share: held out, in (0, 1).
        seed: of the split.

    Returns:
        int64 positions ``[N - h]`` and ``[h]``, ascending.
    """
    stratify = labels.numpy() if int(labels.bincount()[labels.unique()].min()) > 1 else None
    try:
        parts = train_test_split(np.arange(len(labels)), test_size=share, stratify=stratify, random_state=seed)
    except ValueError as error:
        raise UserError(
            f"eval.holdout={share}: cannot hold out that share of {len(labels)} labels ({error})"
        ) from error
    fit, held = (torch.from_numpy(np.sort(p)) for p in parts)
    return fit, held


def judge(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    protocol: Protocol,
    seed: int,
    probes: Sequence[str] = ("linear", "knn"),
) -> dict[str, dict[str, Any]]:
    """Choose on held-out training labels, refit on all of them, and read the test labels once.

    Args:
        train: ``[N, F]`` features of labelled training images.
        train_labels: int64 ``[N]``.
        test: ``[T, F]``.
        test_labels: int64 ``[T]``.
        protocol: what is tried.
        seed: of the held-out split.
        probes: "linear", "knn" or both.

    Returns:
        For each probe: ``val_top1`` and ``test_top1`` in [0, 1], and what was chosen.
    """
    fit, held = split_holdout(train_labels, protocol.holdout, seed)
    results = {}
    for name in probes:
        choose = {"linear": _linear, "knn": _knn}[name]
        predicted, result = choose(train, train_labels, fit, held, test, protocol)
        results[name] = {**result, "test_top1": _accuracy(predicted, test_labels)}
    return results


def _linear(
    train: Tensor, labels: Tensor, fit: Tensor, held: Tensor, test: Tensor, protocol: Protocol
) -> tuple[Tensor, dict[str, Any]]:
    best: dict[str, Any] = {"val_top1": -1.0}
    # Strong penalties first: of a tie, the strongest is kept.
    for l2 in sorted(protocol.l2, reverse=True):
        model, _ = _fit_linear(train[fit], labels[fit], l2, protocol.max_iterations)
        accuracy = _accuracy(torch.from_numpy(model.predict(train[held].numpy())), labels[held])
        if accuracy > best["val_top1"]:
            best = {"val_top1": accuracy, "l2": l2}
    model, converged = _fit_linear(train, labels, best["l2"], protocol.max_iterations)
    return torch.from_numpy(model.predict(test.numpy())), {**best, "converged": converged}


def _fit_linear(features: Tensor, labels: Tensor, l2: float, max_iterations: int) -> tuple[Any, bool]:
    # scikit-learn's C weighs the sum of the losses, hence the number of images in it.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (l2 * len(labels)), max_iter=max_iterations))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features.numpy(), labels.numpy())
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
    if not converged:
        log.warning(
            "linear probe at L2 %g: not converged in %d iterations; raise eval.max_iterations", l2, max_iterations
        )
    return model, converged


def _knn(
    train: Tensor, labels: Tensor, fit: Tensor, held: Tensor, test: Tensor, protocol: Protocol
) -> tuple[Tensor, dict[str, Any]]:
    classes = int(labels.max()) + 1
    # More neighbours than there are images to vote would be the same as all of them.
    numbers = [k for k in protocol.k if k <= len(fit)] or [len(fit)]
    similarity, position = knn_neighbours(train[fit], train[held], max(numbers))
    votes = labels[fit][position]
    best: dict[str, Any] = {"val_top1": -1.0}
    for k, temperature in itertools.product(numbers, protocol.temperature):
        accuracy = _accuracy(knn_vote(similarity, votes, k, temperature, classes), labels[held])
        if accuracy > best["val_top1"]:
            best = {"val_top1": accuracy, "k": k, "temperature": temperature}
    similarity, position = knn_neighbours(train, test, best["k"])
    return knn_vote(similarity, labels[position], best["k"], best["temperature"], classes), best


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).double().mean())
