"""Mean loss of the rows of a similarity matrix that is never held as a whole; all contrastive losses use it.

Suffixes of names are shapes: N rows (anchors), M columns (candidates), D embedding size, B rows of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

# Largest number of logits that are computed together, which on a CPU stay in its cache, unless that would leave few
# rows, whose products are slow (measured).
CPU_BLOCK, GPU_BLOCK, FEWEST_ROWS = 2**21, 2**26, 128
Products = Literal["full", "bf16"]
RowLosses = tuple[Tensor, Tensor, list[Tensor]]  # losses, and derivatives by the positives and by the log-sums


@dataclass(frozen=True)
class Rows:
    """Loss of each row, and the columns that are not negatives of it.

    Args:
        loss: function of the logits of the positives ``[B]``, the log-sums ``[B]`` of each scale, and the numbers of
            negatives ``[B]`` if ``counted``, otherwise None. Returns the losses ``[B]``, their derivatives by the
            logits of the positives, and their derivatives by the log-sums of each scale.
        scales: the log-sum of scale s is ``log sum exp(s logit)`` over the negatives of a row; s > 0.
        counted: whether ``loss`` needs the numbers of negatives.
        own: int64 ``[N, k]``, columns that are not negatives of each row; None for no such columns.
        same: function of a slice of the rows that returns a boolean ``[B, M]``, true where a column is not a negative;
            None for no further ones.
        above: logit above which a column is not a negative, a number or a scalar tensor; None for no limit.
        products: precision of the products that give the logits: "full" for that of the embeddings, or "bf16".
    """

    loss: Callable[[Tensor, list[Tensor], Tensor | None], RowLosses]
    scales: tuple[float, ...] = (1.0,)
    counted: bool = False
    own: Tensor | None = None
    same: Callable[[slice], Tensor] | None = None
    above: Tensor | float | None = None
    products: Products = "full"


def mean_loss(anchors: Tensor, candidates: Tensor, positive: Tensor, rows: Rows) -> Tensor:
    """Compute the mean loss of all rows block by block, and its gradient in the same pass.

    Each block takes one matrix product for its logits and two for the gradient, which is accumulated at once: no logit
    is computed again or kept. Memory beyond the arguments and their gradients is that of one block.

    Args:
        anchors: ``[N, D]``, fp32 or float64, N >= 1.
        candidates: ``[M, D]`` of the same dtype; the logits are ``anchors @ candidates.T``.
        positive: ``[N]``, logit of the positive of each row.
        rows: loss of each row. A row without negatives has loss 0 and no gradient.

    Returns:
        A scalar of the same dtype.

    Raises:
        RuntimeError: if the gradient of its gradient is asked for.

    Example:
        >>> def decoupled(positive, log_sums, count):
        ...     return log_sums[0] - positive, -torch.ones_like(positive), [torch.ones_like(positive)]
        >>> mean_loss(torch.eye(2), -torch.eye(2), torch.ones(2), Rows(decoupled))  # log(1 + 1/e) - 1
        tensor(-0.6867)
    """
    if not len(candidates):
        return 0 * positive.sum()
    return cast(Tensor, _MeanLoss.apply(anchors, candidates, positive, rows, torch.is_grad_enabled()))


def equal_ids(ids: Tensor, others: Tensor) -> Callable[[slice], Tensor]:
    """Return a function of a block of rows that compares the ids of the rows with those of the columns.

    Args:
        ids: int ``[N]``, ids of the rows; those below 0 are equal to no other.
        others: int ``[M]``, ids of the columns.

    Returns:
        Function that maps a slice to a boolean ``[B, M]``, true where the ids are equal.

    Example:
        >>> equal_ids(torch.tensor([3, -1]), torch.tensor([3, 3, -1]))(slice(0, 2)).tolist()
        [[True, True, False], [False, False, False]]
    """
    known = torch.where(ids >= 0, ids, -1)[:, None]
    columns = torch.where(others >= 0, others, -2)
    return lambda block: known[block] == columns


def known_views(same: Tensor, rows: Tensor, n: int) -> Callable[[slice], Tensor]:
    """Known positives among both views of n images, for rows that are views of the images ``rows``.

    Args:
        same: ids or a mask, see :func:`twoview.losses.nt_xent`.
        rows: int64 ``[M]``, image of each row.
        n: number of images.

    Raises:
        ValueError: if ``same`` has another shape or type.
    """
    if same.shape == (n,) and not same.is_floating_point():
        return equal_ids(same[rows], same.repeat(2))
    if same.shape != (n, n) or same.dtype != torch.bool:
        raise ValueError(f"same must be int [{n}] or boolean [{n}, {n}], not {same.dtype} {list(same.shape)}")
    return lambda block: same[rows[block]].repeat(1, 2)


def known_keys(same: Tensor | tuple[Tensor, Tensor], n: int, k: int) -> Callable[[slice], Tensor]:
    """Known positives of n queries among k stored keys; ``same`` as in :func:`twoview.losses.info_nce`.

    Raises:
        ValueError: if ``same`` has another shape or type.
    """
    if isinstance(same, tuple):
        if [len(ids) for ids in same] != [n, k]:
            raise ValueError(f"same must be ids [{n}] and [{k}], not {[list(ids.shape) for ids in same]}")
        return equal_ids(*same)
    if same.shape != (n, k) or same.dtype != torch.bool:
        raise ValueError(f"same must be boolean [{n}, {k}], not {same.dtype} {list(same.shape)}")
    return lambda block: same[block]


def count_equal(ids: Tensor, others: Tensor) -> Tensor:
    """Count the entries of ``others`` that are equal to each id, with memory linear in their numbers.

    Args:
        ids: int ``[N]``; the count of an id below 0 is 0.
        others: int ``[M]``.

    Returns:
        int64 ``[N]``.

    Example:
        >>> count_equal(torch.tensor([3, -1]), torch.tensor([3, 3, -1]))
        tensor([2, 0])
    """
    ids, order = ids.contiguous(), others.sort().values
    counts = torch.searchsorted(order, ids, right=True) - torch.searchsorted(order, ids)
    return torch.where(ids >= 0, counts, 0)


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor, positive: Tensor, rows: Rows, graph: bool) -> Tensor:
        total = positive.new_zeros(())
        inputs = zip((anchors, candidates, positive), ctx.needs_input_grad[:3], strict=True)
        ctx.gradients = gradients = [torch.zeros_like(x) if graph and needed else None for x, needed in inputs]
        of_anchors, of_candidates, of_positive = gradients
        product = candidates.bfloat16() if rows.products == "bf16" else candidates
        size = max(FEWEST_ROWS, (CPU_BLOCK if anchors.device.type == "cpu" else GPU_BLOCK) // len(candidates))
        for start in range(0, len(anchors), size):
            block = slice(start, start + size)
            logits = _logits(anchors[block], product, rows, block)
            loss, d_positive, weights, factor = _block(logits, positive[block], rows, 1 / len(anchors))
            total += loss
            # The gradient by the logits is factor * weights; the factor is applied to the smaller matrices.
            if of_anchors is not None:
                torch.mm(weights, candidates, out=of_anchors[block]).mul_(factor)
            if of_candidates is not None:
                of_candidates.addmm_(weights.T, anchors[block] * factor)
            if of_positive is not None:
                of_positive[block] = d_positive
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if torch.is_grad_enabled():  # only with create_graph=True
            message = "the contrastive losses compute their gradient together with their value; it has no gradient"
            raise RuntimeError(f"{message} of its own, so create_graph=True is not possible")
        return *(None if x is None else x * gradient for x in ctx.gradients), None, None


def _logits(anchors: Tensor, candidates: Tensor, rows: Rows, block: slice) -> Tensor:
    """Logits ``[B, M]``, -inf where a column is not a negative."""
    logits = (anchors.to(candidates.dtype) @ candidates.T).to(anchors.dtype)
    if rows.above is not None:
        logits.masked_fill_(logits > rows.above, -torch.inf)
    if rows.own is not None:
        logits.scatter_(1, rows.own[block], -torch.inf)
    if rows.same is not None:
        logits.masked_fill_(rows.same(block), -torch.inf)
    return logits


def _block(logits: Tensor, positive: Tensor, rows: Rows, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the losses of a block times ``share``, and its gradients by the positives and by the logits.

    The latter is a product of two tensors, ``[B, M]`` and ``[B, 1]``. The logits are overwritten.
    """
    largest = logits.amax(1, keepdim=True)
    any_negative = largest > -torch.inf
    largest = torch.where(any_negative, largest, 0.0)
    count = (logits > -torch.inf).sum(1) if rows.counted else None
    # Each row is relative to its own maximum: relative to a constant, small temperatures would underflow.
    logits.sub_(largest)
    powers = [logits.exp_() if rows.scales == (1.0,) else logits.mul(scale).exp_() for scale in rows.scales]
    sums = [power.sum(1) for power in powers]  # at least 1, except in rows without negatives
    log_sums = [s * largest[:, 0] + x.clamp(min=1).log() for s, x in zip(rows.scales, sums, strict=True)]
    losses, by_positive, by_sums = rows.loss(positive, log_sums, count)
    share_B = any_negative[:, 0].to(positive.dtype) * share
    of_positive, of_sums = by_positive * share_B, [by_sum * share_B for by_sum in by_sums]
    # The derivative of a log-sum by a logit is scale * power / sum.
    parts = zip(rows.scales, of_sums, sums, strict=True)
    weights, factor, *others = powers[0], *((s * g / x.clamp(min=1))[:, None] for s, g, x in parts)
    if others:
        weights.mul_(factor)
        for power, other in zip(powers[1:], others, strict=True):
            weights.addcmul_(power, other)
        factor = torch.ones_like(factor)
    return losses @ share_B, of_positive, weights, factor
