"""Schedules as pure functions of progress, without a stored current value."""

import math
from typing import Literal


def warmup_cosine(epoch: float, epochs: float, warmup_epochs: float = 10.0, end: float = 0.0) -> float:
    """Factor of the base learning rate: linear warm-up, then cosine decay to ``end``.

    SimCLR, appendix B.6; cosine decay of Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.

    Args:
        epoch: completed epochs, with fractions; >= 0.
        epochs: length of the run; ``inf`` while it is unknown: the factor then stays at 1 after the warm-up.
        warmup_epochs: length of the warm-up, at most a fifth of the run.
        end: factor at the end of the run, in [0, 1].

    Returns:
        A factor in [0, 1].

    Example:
        >>> [round(warmup_cosine(e, 100), 3) for e in (0, 5, 10, 55, 100)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warmup = min(warmup_epochs, epochs / 5)
    if epoch < warmup:
        return epoch / warmup
    progress = min(1.0, (epoch - warmup) / (epochs - warmup)) if epochs > warmup else 1.0
    return cosine_ramp(progress, 1.0, end)


def constant(epoch: float, epochs: float) -> float:
    """Factor 1 at every epoch; has the arguments of :func:`warmup_cosine`.

    Example:
        >>> constant(3, 100)
        1.0
    """
    return 1.0


def cosine_ramp(progress: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at progress 1.

    Example:
        >>> cosine_ramp(0.0, 0.996, 1.0), cosine_ramp(1.0, 0.996, 1.0)
        (0.996, 1.0)
    """
    return end - (end - start) * (1.0 + math.cos(math.pi * progress)) / 2.0


def scaled_lr(lr: float, global_batch: int, scaling: Literal["none", "linear", "sqrt"], reference: int = 256) -> float:
    """Learning rate scaled with the batch size.

    Linear scaling: Goyal et al. 2017, arXiv:1706.02677. Square-root scaling suits small batches and short runs (SimCLR,
    appendix B.1).

    Args:
        lr: learning rate for a batch of ``reference`` images.
        global_batch: images per optimizer step, over all ranks and accumulated batches.
        scaling: "none", "linear" or "sqrt".
        reference: batch size for which ``lr`` is given.

    Example:
        >>> scaled_lr(0.3, 4096, "linear"), scaled_lr(0.3, 1024, "sqrt"), scaled_lr(0.3, 4096, "none")
        (4.8, 0.6, 0.3)
    """
    ratio = global_batch / reference
    return lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[scaling]
