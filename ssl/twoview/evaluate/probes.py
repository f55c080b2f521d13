"""Linear probe and kNN on fixed features; every choice is made on a held-out part of the training labels."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.data import split_labels
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
    try:
        return split_labels(labels, share, seed)
    except ValueError as error:
        raise UserError(
            f"eval.holdout={share}: cannot hold out that share of {len(labels)} labels ({error})"
        ) from error


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
    # Strong penalties first: of a tie, the strongest is kept.
    grid = sorted(protocol.l2, reverse=True)
    probes, _ = fit_linear(train[fit], labels[fit], grid, protocol.max_iterations)
    accuracies = [_accuracy(_scores(probe, train[held]).argmax(1), labels[held]) for probe in probes]
    best = int(np.argmax(accuracies))
    probes, converged = fit_linear(train, labels, grid[best : best + 1], protocol.max_iterations)
    chosen = {"val_top1": accuracies[best], "l2": grid[best], "converged": converged}
    return _scores(probes[0], test).argmax(1), chosen


def fit_linear(
    features: Tensor, labels: Tensor, l2: Sequence[float], max_iterations: int = 1000
) -> tuple[Tensor, bool]:
    """Multinomial logistic regressions on standardised features, one for each penalty, fitted together by L-BFGS.

    Each minimises mean cross-entropy + ``l2 / 2`` times the squared norm of the weights; the intercept is free. The
    problem is convex. It is solved in coordinates in which its Hessian at zero weights is nearly the identity, so that
    tens of iterations do where plain coordinates take hundreds.

    Args:
        features: fp32 ``[N, F]``.
        labels: int64 ``[N]``, C classes numbered from 0.
        l2: P penalties.
        max_iterations: of L-BFGS.

    Returns:
        fp32 ``[P, F + 1, C]``, weights for the features as they were given with the intercept last; whether the
        iterations sufficed.
    """
    n, width = features.shape
    classes = int(labels.max()) + 1
    mean, deviation = features.mean(0), features.std(0, correction=0)
    scale = torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.ones_like(deviation))
    standard = (features - mean) / scale
    # In float64: of features with many dead dimensions, LAPACK's fp32 routine may find no eigenvectors.
    variances, directions = (x.float() for x in torch.linalg.eigh((standard.T @ standard / n).double()))
    penalties = torch.tensor(l2, dtype=torch.float32)
    # At zero weights the softmax contributes covariance / C to the Hessian.
    unit = (variances.clamp(min=0) / classes + penalties[:, None]).rsqrt()[..., None]  # [P, F, 1]
    weights = torch.zeros(len(l2), width, classes, requires_grad=True)
    intercepts = torch.zeros(len(l2), 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, intercepts],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, 2**24 // (len(l2) * classes))

    def loss() -> Tensor:
        optimizer.zero_grad()
        total: Tensor = (0.5 * penalties[:, None, None] * (unit * weights).square()).sum()
        total.backward()
        # One product for all penalties; its gradient is summed over the parts before it is taken further back.
        joined = (directions @ (unit * weights)).transpose(0, 1).flatten(1)
        matrix = joined.detach().requires_grad_()
        for x, y in zip(standard.split(rows), labels.split(rows), strict=True):
            scores = (x @ matrix).unflatten(1, (len(l2), classes)) + intercepts.transpose(0, 1)
            part = F.cross_entropy(scores.flatten(0, 1), y.repeat_interleave(len(l2)), reduction="sum") / n
            part.backward()
            total = total.detach() + part.detach()
        joined.backward(matrix.grad)
        return total

    optimizer.step(loss)
    state = optimizer.state[weights]
    iterations = state["n_iter"]
    converged = iterations < max_iterations and state["func_evals"] < 2 * max_iterations
    if not converged:
        log.warning("linear probe: not converged in %d iterations; raise eval.max_iterations", iterations)
    with torch.no_grad():
        slopes = (directions @ (unit * weights)) / scale[:, None]
        return torch.cat([slopes, intercepts - mean @ slopes[:, None]], dim=1), converged


def _scores(probe: Tensor, features: Tensor) -> Tensor:
    scores: Tensor = features @ probe[:-1] + probe[-1]
    return scores


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
