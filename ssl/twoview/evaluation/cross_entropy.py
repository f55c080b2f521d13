"""Cross-entropy of a linear classifier and its gradient, on a block of images."""

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS_PER_COLUMN = 16  # smallest number of rows of a thread for each column of a product that is divided by rows


def softmax_errors(
    scores: Tensor, labels: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the sum of the cross-entropies of a block, and its gradient with respect to the scores.

    Args:
        scores: fp32 ``[n, C]``.
        labels: int64 ``[n]``, classes in [0, C).
        class_weights: fp32 ``[C]``, factor of the cross-entropy of each class; None for 1.
        label_smoothing: share of each label that is spread over all classes, in [0, 1).

    Returns:
        The sum, a scalar in float64; and fp32 ``[n, C]``.

    Example:
        >>> total, errors = softmax_errors(torch.zeros(1, 2), torch.tensor([1]))
        >>> round(float(total), 4), errors
        (0.6931, tensor([[ 0.5000, -0.5000]]))
    """
    target, smooth = labels[:, None], label_smoothing / scores.shape[1]
    logs = F.log_softmax(scores, 1)
    each = (1 - label_smoothing) * logs.gather(1, target)[:, 0]
    each = each + smooth * logs.sum(1) if smooth else each
    errors = logs.exp_().sub_(smooth) if smooth else logs.exp_()
    errors.scatter_add_(1, target, errors.new_full(target.shape, label_smoothing - 1))
    if class_weights is not None:
        factor = class_weights[labels]
        each, errors = each * factor, errors.mul_(factor[:, None])
    return -each.sum(dtype=torch.float64), errors


def transposed_product(errors: Tensor, features: Tensor) -> Tensor:
    """Return the product ``[C, F]`` of ``errors.T`` and features, ``[n, C]`` and ``[n, F]``.

    On the CPU, each thread computes the product of a part of the rows if they are many more than the columns C. BLAS
    would divide the C columns among the threads, which is slow for small C.
    """
    threads = torch.get_num_threads() if errors.device.type == "cpu" else 1
    if len(errors) < ROWS_PER_COLUMN * threads * errors.shape[1]:
        return errors.T @ features
    whole = len(errors) // threads * threads
    a, b = (x[:whole].view(threads, whole // threads, x.shape[1]) for x in (errors, features))
    return torch.bmm(a.mT, b).sum(0).addmm_(errors[whole:].T, features[whole:])
