"""Logistic regression on many images: blocks of rows, coordinates adapted to the Hessian, and a warm start."""

import contextlib
import logging
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.evaluation.cross_entropy import softmax_errors, transposed_product
from twoview.evaluation.lbfgs import minimize

log = logging.getLogger(__name__)

BLOCK = 2**22  # largest number of features and class scores that are processed at once
HELD = 2**25  # largest number of features that are copied for a fit instead of once in each step
CURVATURE_ROWS = 5000  # number of images from which the diagonal of the Hessian is estimated
TOLERANCE = 1e-6  # estimated distance of the objective from its minimum at which a fit has converged


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
        matrix = (self.directions @ weights[:-1]).T.contiguous()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        slopes, intercepts = torch.zeros_like(matrix), torch.zeros_like(weights[-1])
        for x, y in held or map(self._block, self._parts(positions)):
            part, errors = softmax_errors(F.linear(x, matrix, weights[-1]), y, self.class_weights, self.label_smoothing)
            total += part
            slopes += transposed_product(errors, x)
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
