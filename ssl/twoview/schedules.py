"""Schedules as stateless functions of the progress of training."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from twoview.errors import require


def warmup_cosine(epoch: float, epochs: float, warmup_epochs: float | None = None, end: float = 0.0) -> float:
    """Compute the factor of the base learning rate: linear warm-up, then cosine decay to ``end``.

    SimCLR, Chen et al. 2020, arXiv:2002.05709, appendix B.6. The cosine decay is that of Loshchilov & Hutter 2017,
    arXiv:1608.03983, without restarts.

    Args:
        epoch: number of completed epochs, >= 0; may be a fraction.
        epochs: length of the run in epochs. ``inf`` if the length is unknown; the factor then stays at 1 after the
            warm-up.
        warmup_epochs: length of the warm-up in epochs, >= 0; None for 10. Shortened to a fifth of the run if longer.
        end: factor at the end of the run, in [0, 1].

    Returns:
        The factor, in [0, 1].

    Raises:
        UserError: if ``warmup_epochs`` or ``end`` is out of range.

    Example:
        >>> [round(warmup_cosine(e, 100), 3) for e in (0, 5, 10, 55, 100)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    possible = warmup_epochs is None or (isinstance(warmup_epochs, int | float) and warmup_epochs >= 0)
    require(possible, f"scheduler.warmup_epochs={warmup_epochs}: must be at least 0, or null for 10")
    require(0 <= end <= 1, f"scheduler.end={end}: must lie between 0 and 1, such as 0.1")
    warmup = min(10.0 if warmup_epochs is None else warmup_epochs, epochs / 5)
    if epoch < warmup:
        return epoch / warmup
    progress = min(1.0, (epoch - warmup) / (epochs - warmup)) if epochs > warmup else 1.0
    return cosine_ramp(progress, 1.0, end)


def chosen_warmup(schedule: Callable[..., float]) -> float | None:
    """Return the length of the warm-up in epochs that a partial of a schedule sets; None if it sets none.

    Args:
        schedule: a schedule, or a partial of one with a keyword ``warmup_epochs``.

    Example:
        >>> from functools import partial
        >>> chosen_warmup(partial(warmup_cosine, warmup_epochs=5)), chosen_warmup(warmup_cosine)
        (5, None)
    """
    keywords: dict[str, Any] = getattr(schedule, "keywords", {})
    return keywords.get("warmup_epochs")


def require_warmup_fits(schedule: Callable[..., float], lengths: Mapping[str, float]) -> None:
    """Raise :class:`UserError` if a schedule sets a warm-up that is longer than the run.

    Args:
        schedule: a schedule, or a partial of one.
        lengths: length of the run in epochs by each knob that limits it, such as "trainer.max_epochs=60".

    Example:
        >>> require_warmup_fits(warmup_cosine, {"trainer.max_epochs=3": 3})
    """
    warmup = chosen_warmup(schedule)
    for limit, epochs in lengths.items():
        message = f"longer than the run of {limit}; choose fewer, or null for at most a fifth of the run"
        require(warmup is None or warmup <= epochs, f"scheduler.warmup_epochs={warmup}: {message}")


def constant(epoch: float, epochs: float) -> float:
    """Return the factor 1 of a constant learning rate.

    Args:
        epoch: number of completed epochs; not used.
        epochs: length of the run in epochs; not used.

    Example:
        >>> constant(3, 100)
        1.0
    """
    return 1.0


def cosine_ramp(progress: float, start: float, end: float) -> float:
    """Interpolate between two values along half a period of a cosine.

    Args:
        progress: completed share of the run, in [0, 1].
        start: value at progress 0.
        end: value at progress 1.

    Example:
        >>> cosine_ramp(0.0, 0.996, 1.0), cosine_ramp(1.0, 0.996, 1.0)
        (0.996, 1.0)
    """
    return end - (end - start) * (1.0 + math.cos(math.pi * progress)) / 2.0


def scaled_lr(lr: float, global_batch: int, scaling: Literal["none", "linear", "sqrt"], reference: int = 256) -> float:
    """Scale a learning rate with the batch size.

    Linear scaling is from Goyal et al. 2017, arXiv:1706.02677. Square-root scaling suits small batches and short runs
    (SimCLR, Chen et al. 2020, arXiv:2002.05709, appendix B.1).

    Args:
        lr: learning rate for a batch of ``reference`` images.
        global_batch: number of images per optimizer step, over all ranks and accumulated batches.
        scaling: "none" for ``lr``; "linear" and "sqrt" multiply ``lr`` by the ratio of batch sizes or by its square
            root.
        reference: batch size that ``lr`` is given for.

    Example:
        >>> scaled_lr(0.3, 4096, "linear"), scaled_lr(0.3, 1024, "sqrt"), scaled_lr(0.3, 4096, "none")
        (4.8, 0.6, 0.3)
    """
    ratio = global_batch / reference
    return lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[scaling]
