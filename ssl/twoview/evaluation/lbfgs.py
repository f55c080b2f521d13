"""Minimum of a convex function by L-BFGS."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROUNDING = 1e-9  # change of the function, relative to its value, below which the search ends
HISTORY = 20  # number of steps from which L-BFGS estimates the Hessian


def minimize(
    objective: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    max_iterations: int,
    tolerance: float,
    history: int = HISTORY,
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
        history: number of steps from which the Hessian is estimated.

    Returns:
        The point, and whether the search ended within ``max_iterations``: at the tolerance, or where the value no
        longer changes but for rounding.
    """
    point, (value, gradient) = start, objective(start)
    steps: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=history)
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


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))
