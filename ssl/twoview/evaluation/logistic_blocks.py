"""Logistic regression on many images: blocks of rows, coordinates adapted to the Hessian, and a warm start."""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

BLOCK = 2**22  # largest number of features and class scores that are processed at once
HELD = 2**25  # largest number of features that are copied for a fit instead of once in each step
CURVATURE_ROWS = 5000  # number of images from which the diagonal of the Hessian is estimated
TOLERANCE = 1e-6  # estimated distance of the objective from its minimum at which a fit has converged
ROUNDING = 1e-9  # change of the objective, relative to its value, below which a fit ends
HISTORY = 20  # number of steps from which L-BFGS estimates the Hessian


class Regression:
    """Mean cross-entropy of a linear classifier; memory for it does not grow with the number N of images.

    The classifier has weights ``[F + 1, C]``: along the F principal directions of the scaled features, and in the last
    row the intercepts.

    Args:
        features: fp32 ``[N, F]``, in memory, on the device, or in a file that is mapped into memory.
        labels: int64 ``[N]``, classes in [0, C).
        scale: fp32 ``[F]``, numbers by which the features are divided, > 0.
        classes: number of classes C.
        class_weights: fp32 ``[C]``, factor of the cross-entropy of each class; None for 1.
        label_smoothing: share of each label that is spread over all classes, in [0, 1).
        device: CUDA device to which blocks of rows are copied; otherwise, the device of the features is used.
        rows: number of rows of a block; None for a number that depends on F and C.
        basis: orthogonal matrix fp32 ``[F, F]`` that is used instead of the principal directions, such as the basis of
            a problem with a part of the images; None to compute them.

    Attributes:
        basis: the directions, fp32 ``[F, F]``, each a column.
    """

    def __init__(  # noqa: PLR0913
        self,
        features: Tensor,
        labels: Tensor,
        scale: Tensor,
        classes: int,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        device: torch.device | None = None,
        rows: int | None = None,
        basis: Tensor | None = None,
    ) -> None:
        # Other devices than CUDA may lack float64.
        self.device = device if device is not None and device.type == "cuda" else features.device
        self.features, self.labels, self.classes = features, labels, classes
        weights = torch.ones(classes) if class_weights is None else class_weights
        self.class_weights, self.label_smoothing = weights.to(self.device), label_smoothing
        self.rows = rows or max(256, BLOCK // (classes + features.shape[1]))
        self.mean, scale = features.mean(0).to(self.device), scale.to(self.device)
        self.basis = self._principal_directions(scale) if basis is None else basis.to(self.device)
        # Applied to the weights in each step instead of once to the features, of which a copy would be needed.
        self.directions, self.inverse = self.basis / scale[:, None], self.basis * scale[:, None]  # [F, F]

    def loss(
        self, weights: Tensor, positions: Tensor | None = None, held: Sequence[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[float, Tensor]:
        """Compute the mean cross-entropy and its gradient.

        Args:
            weights: fp32 ``[F + 1, C]``.
            positions: int64 ``[M]``, positions of the images over which the mean is taken; None for all images.
            held: blocks of the centered features and labels of these images, if they are known already.

        Returns:
            The mean, and its gradient ``[F + 1, C]``.
        """
        matrix, smooth = (self.directions @ weights[:-1]).T.contiguous(), self.label_smoothing / self.classes
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        slopes, intercepts = torch.zeros_like(matrix), torch.zeros_like(weights[-1])
        for x, y in held or map(self._block, self._parts(positions)):
            factor, target = self.class_weights[y], y[:, None]
            logs = F.log_softmax(F.linear(x, matrix, weights[-1]), 1)
            each = (1 - self.label_smoothing) * logs.gather(1, target)[:, 0]
            total -= (factor * (each + smooth * logs.sum(1) if smooth else each)).sum(dtype=torch.float64)
            errors = logs.exp_().sub_(smooth) if smooth else logs.exp_()
            errors.scatter_add_(1, target, errors.new_full(target.shape, self.label_smoothing - 1))
            errors *= factor[:, None]
            slopes += _product(errors, x)
            intercepts += errors.sum(0)
        gradient = torch.cat([self.directions.T @ slopes.T, intercepts[None]])
        count = len(self.labels) if positions is None else len(positions)
        return float(total) / count, gradient / count

    def curvature(self, weights: Tensor) -> Tensor:
        """Return the diagonal of the Hessian ``[F + 1, C]`` of the mean cross-entropy, estimated on some images."""
        z, labels = self._sample
        total = torch.empty_like(weights)
        p = torch.addmm(weights[-1], z, weights[:-1]).softmax(1)
        spread = p.mul_(1 - p).mul_(self.class_weights[labels][:, None]).div_(len(z))
        torch.mm(z.square().T, spread, out=total[:-1])
        total[-1] = spread.sum(0)
        return total

    def fit(
        self,
        l2: float,
        start: Tensor | None = None,
        max_iterations: int = 1000,
        tolerance: float = TOLERANCE,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, bool]:
        """Minimize the mean cross-entropy plus ``l2 / 2`` times the squared norm of the weights of scaled features.

        Args:
            l2: penalty, > 0; the intercept is not penalized.
            start: fp32 ``[F + 1, C]``, weights for unscaled features to start from; None for zeros.
            max_iterations: largest number of iterations of L-BFGS, at least 1.
            tolerance: estimated distance of the objective from its minimum at which the fit has converged.
            positions: int64 ``[M]``, positions of the images that are fitted; None for all images. The features are
                scaled as those of all images.

        Returns:
            The weights for unscaled features on the CPU, fp32 ``[F + 1, C]``, with the intercept in the last row; and
            whether the fit converged.
        """
        weights = torch.zeros(self.directions.shape[1] + 1, self.classes, device=self.device)
        if start is not None:
            start = start.to(self.device)
            weights = torch.cat([self.inverse.T @ start[:-1], start[-1:] + self.mean @ start[:-1]])
        penalty = torch.full_like(weights[:, :1], l2)
        penalty[-1] = 0
        # Coordinates in which the Hessian is about the identity. The bound keeps classes without images finite.
        unit = (self.curvature(weights).clamp(min=1e-3 / self.classes) + penalty).rsqrt()

        count = len(self.labels) if positions is None else len(positions)
        fits = count * self.features.shape[1] <= HELD
        held = [self._block(part) for part in self._parts(positions)] if fits else None

        def objective(point: Tensor) -> tuple[float, Tensor]:
            weights = unit * point
            loss, gradient = self.loss(weights, positions, held)
            penalized = penalty * weights
            return loss + 0.5 * float((penalized * weights).sum(dtype=torch.float64)), unit * (gradient + penalized)

        point, converged = minimize(objective, weights / unit, max_iterations, tolerance)
        if not converged:
            log.warning("linear probe: not converged in %d iterations; raise eval.max_iterations", max_iterations)
        weights = unit * point
        slopes = self.directions @ weights[:-1]
        return torch.cat([slopes, weights[-1:] - self.mean @ slopes]).cpu(), converged

    def _principal_directions(self, scale: Tensor) -> Tensor:
        """Principal directions fp32 ``[F, F]`` of the features divided by ``scale``, each a column."""
        covariance = torch.zeros(len(scale), len(scale), dtype=torch.float64, device=self.device)
        for part in self._parts(None):
            x = self._block(part)[0].div_(scale)
            covariance += x.T @ x
        with contextlib.suppress(RuntimeError):  # with many constant features, LAPACK may fail in fp32
            directions: Tensor = torch.linalg.eigh(covariance.float()).eigenvectors
            return directions
        directions = torch.linalg.eigh(covariance).eigenvectors
        return directions.float()

    @cached_property
    def _sample(self) -> tuple[Tensor, Tensor]:
        """Features ``[n, F]`` along the directions, and labels ``[n]``, of some images for the curvature."""
        # fp32 could not represent the positions of more than 2^24 images.
        last, some = len(self.labels) - 1, min(CURVATURE_ROWS, len(self.labels))
        x, labels = self._block(torch.linspace(0, last, some, dtype=torch.float64).long())
        return x @ self.directions, labels

    def _parts(self, positions: Tensor | None) -> Sequence[slice | Tensor]:
        """Rows of each block. Slices of features in memory are not copied."""
        if positions is not None:
            return list(positions.split(self.rows))
        return [slice(start, start + self.rows) for start in range(0, len(self.labels), self.rows)]

    def _block(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Centered features ``[n, F]`` and labels ``[n]`` of some rows, on the device."""
        return self.features[rows].to(self.device) - self.mean, self.labels[rows].to(self.device)


def minimize(
    objective: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, bool]:
    """Minimize a convex function, whose Hessian is about the identity, by L-BFGS with a backtracking line search.

    Source: Nocedal & Wright 2006, Numerical Optimization, algorithms 3.1 and 7.4. On a strictly convex function, every
    step has positive curvature, so that the Wolfe condition on the slope is not needed.

    Args:
        objective: function that returns its value and its gradient at a point.
        start: fp32 tensor of any shape, where the search begins.
        max_iterations: largest number of iterations, at least 1.
        tolerance: value of half the squared norm of the gradient at which the search ends. For a Hessian equal to the
            identity, this is the distance of the function from its minimum.

    Returns:
        The point, and whether the search ended within ``max_iterations``: at the tolerance, or where the value no
        longer changes but for rounding.
    """
    point, (value, gradient) = start, objective(start)
    steps: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=HISTORY)
    for _ in range(max_iterations):
        if _dot(gradient, gradient) / 2 <= tolerance:
            return point, True
        direction = _descent(gradient, steps)
        slope, length = _dot(gradient, direction), 1.0
        for _ in range(20):
            candidate = point + length * direction
            new_value, new_gradient = objective(candidate)
            excess = new_value - value - length * slope
            # The value is known up to rounding only, which must not reject a step near the minimum.
            if new_value <= value + 1e-4 * length * slope + 100 * ROUNDING * abs(value):
                break
            length *= min(0.5, max(0.1, -0.5 * length * slope / excess))  # minimum of the parabola
        change, turn = candidate - point, new_gradient - gradient
        if (product := _dot(change, turn)) > 0:
            steps.append((change, turn, product))
        progress, point, value, gradient = value - new_value, candidate, new_value, new_gradient
        if abs(progress) <= ROUNDING * abs(value):
            return point, True
    return point, _dot(gradient, gradient) / 2 <= tolerance


def _descent(gradient: Tensor, steps: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Direction of L-BFGS: minus the gradient times the inverse Hessian that the steps suggest."""
    direction, shares = -gradient, []
    for change, turn, product in reversed(steps):
        shares.append(_dot(change, direction) / product)
        direction = direction - shares[-1] * turn
    if steps:
        _, turn, product = steps[-1]
        direction = direction * (product / _dot(turn, turn))
    for (change, turn, product), share in zip(steps, reversed(shares), strict=True):
        direction = direction + (share - _dot(turn, direction) / product) * change
    return direction


def _product(errors: Tensor, features: Tensor) -> Tensor:
    """The product ``[C, F]`` of ``errors.T`` and features, ``[n, C]`` and ``[n, F]``.

    A thread for each part of the rows: BLAS would divide the C columns among the threads, which is slow for small C.
    """
    threads = torch.get_num_threads()
    whole = len(errors) // threads * threads
    a, b = (x[:whole].view(threads, whole // threads, x.shape[1]) for x in (errors, features))
    return torch.bmm(a.mT, b).sum(0).addmm_(errors[whole:].T, features[whole:])


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))
