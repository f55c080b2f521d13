"""Logistic regression on features, for a grid of penalties at once."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.evaluation.cross_entropy import softmax_errors, transposed_product
from twoview.evaluation.lbfgs import HISTORY, minimize

log = logging.getLogger(__name__)

ROUNDING = 3e-7  # bound on the rounding errors of a product of matrices, relative to the trace
TOLERANCE = 1e-11  # estimated distance of the objective from its minimum at which a fit has converged
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
    numbers = len(l2) * (1 + len(factors[0])) * classes
    history = max(10, min(HISTORY, HISTORY_NUMBERS // (2 * numbers + 1)))
    rows, joined_labels = max(1, 2**24 // (len(l2) * classes)), labels.repeat_interleave(len(l2))

    def unwhitened(point: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of scaled features ``[P, R, C]`` and intercepts ``[P, 1, C]``."""
        return torch.linalg.solve_triangular(factors.mT, point[:, :-1], upper=True), point[:, -1:] * classes**0.5

    def objective(point: Tensor) -> tuple[float, Tensor]:
        weights, intercepts = unwhitened(point)
        penalized = penalties[:, None, None] * weights
        total = 0.5 * (penalized * weights).sum(dtype=torch.float64)
        # One matrix for all penalties.
        matrix = weights.mT.flatten(0, 1)  # [P * C, R]
        slopes, constants = torch.zeros_like(matrix), matrix.new_zeros(len(matrix))
        for x, y in zip(standard.split(rows), joined_labels.split(rows * len(l2)), strict=True):
            scores = F.linear(x, matrix, intercepts.flatten()).view(-1, classes)
            part, errors = softmax_errors(scores, y, class_weights, label_smoothing)
            errors = errors.view(len(x), -1)
            total += part / n
            slopes += transposed_product(errors, x)
            constants += errors.sum(0)
        slopes = slopes.unflatten(0, (len(l2), classes)).mT / n + penalized
        slopes = torch.linalg.solve_triangular(factors, slopes, upper=False)
        return float(total), torch.cat([slopes, constants.view(len(l2), 1, classes) * classes**0.5 / n], 1)

    start = standard.new_zeros(len(l2), len(factors[0]) + 1, classes)
    point, converged = minimize(objective, start, max_iterations, TOLERANCE, history)
    if not converged:
        log.warning("linear probe: not converged in %d iterations; raise eval.max_iterations", max_iterations)
    found, intercepts = unwhitened(point)
    found = found if n >= features.shape[1] else span @ found
    slopes = found / scale[:, None]
    return torch.cat([slopes, intercepts - mean @ slopes[:, None]], dim=1), converged


def _cholesky_factors(standard: Tensor, penalties: Tensor, classes: int) -> Tensor:
    """Factors L ``[P, R, R]``, L L^T = Hessian of the slopes at zero weights, for centered features ``[N, R]``."""
    # At zero weights the softmax contributes covariance / C to the Hessian. In fp32, LAPACK may find no factor.
    hessian = (standard.T @ standard).double() / (len(standard) * classes)
    diagonal = penalties.double() + ROUNDING * hessian.trace()
    return torch.stack([torch.linalg.cholesky(hessian + x * torch.eye(len(hessian)).to(x)) for x in diagonal]).float()
