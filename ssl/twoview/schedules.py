"""Schedules as functions of progress: nothing here remembers a current value."""

import math
from typing import Literal


def warmup_cosine(epoch: float, epochs: float, warmup_epochs: float = 10.0, end: float = 0.0) -> float:
    """Factor of the base learning rate: linear warm-up, then half a cosine to ``end``.

    SimCLR, appendix B.6; the cosine of Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.

    Args:
        epoch: epochs done, with fractions; >= 0.
        epochs: length of the run; ``inf`` while it is not known yet: the factor then stays at 1 after the warm-up.
        warmup_epochs: length of the warm-up, cut to a fifth of the run so that short runs do learn.
        end: factor at the end of the run, in [0, 1].

    Returns:
        A factor in [0, 1].

    >>> [round(warmup_cosine(e, 100), 3) for e in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warmup = min(warmup_epochs, epochs / 5)
    if epoch < warmup:
        return epoch / warmup
    progress = min(1.0, (epoch - warmup) / (epochs - warmup)) if epochs > warmup else 1.0
    return cosine_ramp(progress, 1.0, end)


def constant(epoch: float, epochs: float) -> float:
    """Factor 1 throughout."""
    return 1.0


def cosine_ramp(progress: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at progress 1.

    >>> cosine_ramp(0.0, 0.996, 1.0), cosine_ramp(1.0, 0.996, 1.0)
    (0.996, 1.0)
    """
    return end - (end - start) * (1.0 + math.cos(math.pi * progress)) / 2.0


def scaled_lr(lr: float, global_batch: int, scaling: Literal["none", "linear", "sqrt"], reference: int = 256) -> float:
    """Learning rate for a batch: the one place in which it is scaled.

    Linear in the batch is the rule of Goyal et al. 2017, arXiv:1706.02677; the square root suits small batches and
    short runs (SimCLR, appendix B.1).

    Args:
        lr: learning rate at a batch of ``reference`` images.
        global_batch: images in one optimiser step, over all ranks and accumulated batches.
        scaling: "none", "linear" or "sqrt".
        reference: the batch at which ``lr`` holds.

    >>> scaled_lr(0.3, 4096, "linear"), scaled_lr(0.3, 1024, "sqrt"), scaled_lr(0.3, 4096, "none")
    (4.8, 0.6, 0.3)
    """
    ratio = global_batch / reference
    return lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[scaling]
