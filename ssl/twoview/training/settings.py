"""Settings of pretraining as frozen dataclasses."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from twoview.augment import TwoViews
from twoview.backbones import create_backbone
from twoview.errors import require, require_at_least, require_choice
from twoview.heads import projection_head
from twoview.methods import Method, SimCLR
from twoview.optim import OptimizerSettings
from twoview.schedules import warmup_cosine

Loggers = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What is trained and how. Networks and views are given as functions that build them.

    Args:
        method: ``(backbone, head) -> Method``, such as :class:`twoview.methods.SimCLR`.
        backbone: ``() -> (network, F)``, a partial of :func:`twoview.backbones.create_backbone`; number of channels and
            size must be those of the images.
        head: ``(F) -> module``, builds the projection head for F features.
        augment: builds the views, such as :class:`twoview.augment.TwoViews`; called with size, channels and statistics
            of the images.
        optimizer: which optimizer at which learning rate.
        schedule: ``(epoch, epochs) -> factor`` of the learning rate.
    """

    method: Callable[[nn.Module, nn.Module], Method] = SimCLR
    backbone: Callable[[], tuple[nn.Module, int]] = create_backbone
    head: Callable[[int], nn.Module] = projection_head
    augment: Callable[..., TwoViews] = TwoViews
    optimizer: OptimizerSettings = OptimizerSettings()  # noqa: RUF009 (frozen)
    schedule: Callable[[float, float], float] = warmup_cosine


@dataclass(frozen=True)
class RunSettings:
    """Where a run writes, its seed, and what happens if it was started before.

    Args:
        run_dir: folder for everything that is written; created if missing.
        seed: seed of initialization, image order, augmentation and held-out split, from 0 to 2^32 - 1.
        loggers: Lightning loggers, by name or as a sequence.
        resume: continue from the last checkpoint in ``run_dir``, if there is one.
        exact: refuse to resume where the result could differ from that of an uninterrupted run: other data, seed, batch
            size, number of processes or threads, precision, device or torch.
        identity: a hash of all settings. If ``run_dir`` holds a report with the same identity, data and version of
            twoview, that report is returned instead of training again. A run that was stopped during its evaluation
            then repeats the evaluation only.
        rerun: start from the beginning in any case; results of an earlier run in ``run_dir`` are overwritten.
    """

    run_dir: str | Path = "run"
    seed: int = 0
    loggers: Loggers = ()
    resume: bool | str | None = None
    exact: bool = True
    identity: str | None = None
    rerun: bool = False


@dataclass(frozen=True)
class TrainerSettings:
    """Length of training, devices and precision.

    Args:
        max_epochs: largest number of passes over the images; None for no limit but ``max_time`` or ``max_steps``.
        max_time: largest training time, as "15m", "2h", "90s" or "HH:MM:SS"; it is converted to a number of steps.
        max_steps: largest number of optimizer steps.
        accelerator: "auto", "cpu", "gpu" or "mps".
        devices: number of processes, one device each.
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed"; see
            :func:`twoview.training.trainer.choose_precision`.
        accumulate: batches per optimizer step; does not add negatives.
        clip: largest norm of the gradient, > 0; None for no limit.
        skip_nonfinite: number of batches that may be skipped because their loss is not finite; one more ends the run.
        log_every: steps between two entries of the log.
        check_every: epochs between kNN checks of the features, 0 for none.

    Raises:
        UserError: a value out of range.

    Example:
        >>> TrainerSettings(max_epochs=None, max_time="1.5h").seconds
        5400.0
    """

    max_epochs: int | None = 60
    max_time: str | None = None
    max_steps: int | None = None
    accelerator: str = "auto"
    devices: int = 1
    precision: str = "auto"
    accumulate: int = 1
    clip: float | None = None
    skip_nonfinite: int = 0
    log_every: int = 10
    check_every: int = 10

    def __post_init__(self) -> None:
        require_choice("trainer", ("auto", "cpu", "gpu", "mps"), accelerator=self.accelerator)
        possible = self.clip is None or (isinstance(self.clip, int | float) and self.clip > 0)
        require(possible, f"trainer.clip={self.clip}: give a number above 0, or null for no limit")
        limits = {"max_epochs": self.max_epochs, "max_time": self.max_time, "max_steps": self.max_steps}
        unlimited = " ".join(f"trainer.{knob}=null" for knob in limits)
        require(any(x is not None for x in limits.values()), f"{unlimited}: set one of them, so that the run ends")
        require_at_least("trainer", 1, max_epochs=self.max_epochs, max_steps=self.max_steps, devices=self.devices)
        require_at_least("trainer", 1, accumulate=self.accumulate, log_every=self.log_every)
        require_at_least("trainer", 0, skip_nonfinite=self.skip_nonfinite, check_every=self.check_every)
        _ = self.seconds

    @property
    def seconds(self) -> float | None:
        """``max_time`` in seconds."""
        if self.max_time is None:
            return None
        text = str(self.max_time)
        try:
            if text[-1] in "smh":
                seconds = float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]
            else:
                hours, minutes, rest = (int(part) for part in text.split(":"))
                seconds = hours * 3600.0 + minutes * 60 + rest
        except (ValueError, IndexError):
            seconds = -1.0
        possible = 0 < seconds < math.inf
        require(possible, f"trainer.max_time={text}: give a time above 0 such as 15m, 2h, 90s or 01:30:00")
        return seconds
