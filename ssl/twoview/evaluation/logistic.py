"""Logistic regression on features, for a grid of penalties at once."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

MIN_VARIANCE = 1e-7  # smallest variance of a principal direction, relative to the largest one
HISTORY_NUMBERS = 2**28  # largest number of values that L-BFGS keeps of earlier steps


def feature_scale(features: Tensor, per_feature: bool = True) -> Tensor:
    """Compute the scale by which features are divided.

    Args:
        features: fp32 ``[N, F]``.
        per_feature: True for one standard deviation per feature; False for one number for all features, which is the
            root mean square of these standard deviations.

    Returns:
        fp32 ``[F]``, > 0; 1 where the standard deviation is 0.
    """
    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = deviation.where(deviation > 1e-6 * mean.abs(), 0.0)  # constant up to rounding
    deviation = deviation if per_feature else deviation.square().mean().sqrt().expand_as(deviation)
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
    """Fit one multinomial logistic regression on scaled features for each penalty, all together by L-BFGS.

    Each regression minimizes the mean cross-entropy plus ``l2 / 2`` times the squared norm of its weights. The
    intercept is not penalized. The problem is convex. It is solved in the subspace that the features span, in
    coordinates in which the Hessian at zero weights is nearly the identity. L-BFGS then needs tens of iterations
    instead of hundreds. A warning is logged if L-BFGS does not converge.

    Args:
        features: fp32 ``[N, F]``.
        labels: int64 ``[N]``, classes in [0, C).
        l2: penalties of the P regressions, > 0.
        max_iterations: largest number of iterations of L-BFGS, at least 1.
        classes: number of classes C; 0 for the largest label plus 1.
        scale: fp32 ``[F]``, numbers by which the features are divided before the fit, > 0. None for the standard
            deviations of the features, which is equivalent to a BatchNorm without parameters.
        class_weights: fp32 ``[C]``, factor of the cross-entropy of each class; None for 1.
        label_smoothing: share of each label that is spread over all classes, in [0, 1).

    Returns:
        The weights for unscaled features, fp32 ``[P, F + 1, C]``, with the intercept in the last row; and whether
        L-BFGS converged.
    """
    n = len(features)
    classes = classes or int(labels.max()) + 1
    mean = features.mean(0)
    scale = feature_scale(features) if scale is None else scale
    standard = (features - mean) / scale
    variances, directions = _principal_directions(standard)
    rotated = standard @ directions
    penalties = torch.tensor(l2, dtype=torch.float32, device=features.device)
    # At zero weights the softmax contributes covariance / C to the Hessian.
    unit = (variances.clamp(min=0) / classes + penalties[:, None]).rsqrt()[..., None]  # [P, R, 1]
    weights, intercepts = (
        torch.zeros(len(l2), size, classes, device=features.device, requires_grad=True) for size in (len(variances), 1)
    )
    limits: dict[str, Any] = {"max_iter": max_iterations, "max_eval": 2 * max_iterations}
    # L-BFGS keeps two copies of the weights for each of its latest steps.
    limits["history_size"] = max(10, min(100, HISTORY_NUMBERS // (2 * weights.numel() + 1)))
    optimizer = torch.optim.LBFGS([weights, intercepts], **limits, tolerance_grad=1e-5, line_search_fn="strong_wolfe")
    rows = max(1, 2**24 // (len(l2) * classes))

    def loss() -> Tensor:
        optimizer.zero_grad()
        total: Tensor = (0.5 * penalties[:, None, None] * (unit * weights).square()).sum()
        total.backward()
        # One matrix for all penalties. Its gradient is summed over blocks of rows, then propagated to the weights once.
        joined = (unit * weights).transpose(0, 1).flatten(1)
        matrix = joined.detach().requires_grad_()
        for x, y in zip(rotated.split(rows), labels.split(rows), strict=True):
            scores = (x @ matrix).unflatten(1, (len(l2), classes)) + intercepts.transpose(0, 1)
            target, flat = y.repeat_interleave(len(l2)), scores.flatten(0, 1)
            each = F.cross_entropy(flat, target, reduction="none", label_smoothing=label_smoothing)
            part = (each if class_weights is None else each * class_weights[target]).sum() / n
            part.backward()
            total = total.detach() + part.detach()
        joined.backward(matrix.grad)
        return total

    optimizer.step(loss)
    state = optimizer.state[weights]
    converged = state["n_iter"] < max_iterations and state["func_evals"] < limits["max_eval"]
    if not converged:
        log.warning("linear probe: not converged in %d iterations; raise eval.max_iterations", state["n_iter"])
    with torch.no_grad():
        slopes = (directions @ (unit * weights)) / scale[:, None]
        return torch.cat([slopes, intercepts - mean @ slopes[:, None]], dim=1), converged


def _principal_directions(standard: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variances ``[R]`` and principal directions ``[F, R]`` of centered features, without rounding noise."""
    n, width = standard.shape
    # In float64: with many constant features, LAPACK's fp32 routine may find no eigenvectors.
    small = (standard.T @ standard if n >= width else standard @ standard.T).double() / n
    variances, directions = torch.linalg.eigh(small)
    spanned = variances > MIN_VARIANCE * variances.max()
    variances, directions = variances[spanned], directions[:, spanned]
    if n < width:
        directions = standard.T.double() @ directions / (n * variances).sqrt()
    return variances.float(), directions.float()
