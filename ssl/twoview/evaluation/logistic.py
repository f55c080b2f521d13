"""Logistic regression on features, for a grid of penalties at once."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

ROUNDING = 3e-7  # bound on the rounding errors of a product of matrices, relative to the trace
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
    coordinates in which the Hessian at zero weights is nearly the identity, by its Cholesky factor. L-BFGS then needs
    tens of iterations instead of hundreds. A warning is logged if L-BFGS does not converge.

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
    if n < features.shape[1]:
        span, triangle = torch.linalg.qr(standard.T)  # [F, N], orthonormal columns
        standard = triangle.T
    penalties = torch.tensor(l2, dtype=torch.float32, device=features.device)
    factors = _cholesky_factors(standard, penalties, classes)
    weights, intercepts = (
        torch.zeros(len(l2), size, classes, device=features.device, requires_grad=True) for size in (len(factors[0]), 1)
    )
    limits: dict[str, Any] = {"max_iter": max_iterations, "max_eval": 2 * max_iterations}
    # L-BFGS keeps two copies of the weights for each of its latest steps.
    limits["history_size"] = max(10, min(100, HISTORY_NUMBERS // (2 * weights.numel() + 1)))
    optimizer = torch.optim.LBFGS([weights, intercepts], **limits, tolerance_grad=1e-5, line_search_fn="strong_wolfe")
    rows = max(1, 2**24 // (len(l2) * classes))

    def solved() -> Tensor:
        found: Tensor = torch.linalg.solve_triangular(factors.mT, weights, upper=True)
        return found  # [P, R, C], weights of scaled features

    def loss() -> Tensor:
        optimizer.zero_grad()
        # One matrix for all penalties. Its gradient is summed over blocks of rows, then propagated to the weights once.
        joined = solved().mT.flatten(0, 1)  # [P * C, R]
        matrix = joined.detach().requires_grad_()
        total: Tensor = (0.5 * penalties.repeat_interleave(classes)[:, None] * matrix.square()).sum()
        total.backward()
        for x, y in zip(standard.split(rows), labels.split(rows), strict=True):
            scores = F.linear(x, matrix).unflatten(1, (len(l2), classes)) + intercepts.transpose(0, 1)
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
        found = solved() if n >= features.shape[1] else span @ solved()
        slopes = found / scale[:, None]
        return torch.cat([slopes, intercepts - mean @ slopes[:, None]], dim=1), converged


def _cholesky_factors(standard: Tensor, penalties: Tensor, classes: int) -> Tensor:
    """Factors L ``[P, R, R]``, L L^T = Hessian of the slopes at zero weights, for centered features ``[N, R]``."""
    # At zero weights the softmax contributes covariance / C to the Hessian. In fp32, LAPACK may find no factor.
    hessian = (standard.T @ standard).double() / (len(standard) * classes)
    diagonal = penalties.double() + ROUNDING * hessian.trace()
    return torch.stack([torch.linalg.cholesky(hessian + x * torch.eye(len(hessian)).to(x)) for x in diagonal]).float()
