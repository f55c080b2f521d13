"""Settings of pretraining as frozen dataclasses."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """Method, networks, augmentation, optimizer and schedule of a run.

    Args:
        method: function ``(backbone, head) -> Method``, such as :class:`twoview.methods.SimCLR`.
        backbone: function ``() -> (network, F)``, such as a partial of :func:`twoview.backbones.create_backbone`, whose
            ``in_chans`` and ``image_size`` must match the images.
        head: function ``(F) -> head`` that builds the projection head for F features.
        augment: function that builds the augmentation, such as :class:`twoview.augment.TwoViews`; called with size,
            channels and statistics of the images as keyword arguments.
        optimizer: optimizer settings.
        schedule: function ``(epoch, epochs) -> factor``, which returns the factor of the learning rate for the number
            of completed epochs and the length of the run in epochs.
    """

    method: Callable[[nn.Module, nn.Module], Method] = SimCLR
    backbone: Callable[[], tuple[nn.Module, int]] = create_backbone
    head: Callable[[int], nn.Module] = projection_head
    augment: Callable[..., TwoViews] = TwoViews
    optimizer: OptimizerSettings = OptimizerSettings()  # noqa: RUF009 (frozen)
    schedule: Callable[[float, float], float] = warmup_cosine

    def __post_init__(self) -> None:
        self.schedule(0.0, 1.0)  # refuses values out of range


@dataclass(frozen=True)
class RunSettings:
    """Folder, seed and loggers of a run, and how to treat an earlier run in the same folder.

    Args:
        run_dir: folder for all files of the run; created if missing.
        seed: seed of initialization, image order, augmentation and held-out split, from 0 to 2^32 - 1.
        loggers: Lightning loggers, as a sequence or a mapping.
        resume: any true value continues from the last checkpoint in ``run_dir``, if there is one. A string has no other
            meaning: the command line passes the path of the run folder, which is also ``run_dir``.
        exact: whether to refuse to resume if the result could differ from that of an uninterrupted run. This is the
            case if ``knobs``, seed, batch size, accumulation, pieces of a batch, precision, number of processes or
            threads, device, data or the version of torch differ.
        identity: hash of all settings, or None. With a hash, a finished run in ``run_dir`` is not repeated: its report
            is returned if identity, data and version of twoview are the same. A run that was stopped during the
            evaluation can then be resumed, which repeats only the evaluation.
        rerun: whether to start from the beginning in any case and overwrite the results of an earlier run.
        files: texts to write to ``run_dir`` once the run has been accepted, by the name of the file.
        knobs: plain values that determine the weights, by name. They are stored in every checkpoint and compared when
            the run is resumed.
    """

    run_dir: str | Path = "run"
    seed: int = 0
    loggers: Loggers = ()
    resume: bool | str | None = None
    exact: bool = True
    identity: str | None = None
    rerun: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    knobs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerSettings:
    """Length of training, devices and precision.

    Args:
        max_epochs: largest number of epochs, >= 1; None for no limit. At least one of the three limits is required.
        max_time: largest training time, such as "15m", "2h", "90s" or "HH:MM:SS"; None for no limit. During the first
            steps, the time is converted to a number of steps.
        max_steps: largest number of optimizer steps, >= 1; None for no limit.
        accelerator: "auto", "cpu", "gpu" or "mps".
        devices: number of devices per node, with one process each, >= 1.
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed"; see
            :func:`twoview.training.trainer.choose_precision`.
        accumulate: number of batches per optimizer step, >= 1; does not increase the number of negatives.
        micro_batch: largest number of images of a device whose activations are in memory together, >= 2; None for the
            whole batch. The loss and its gradient are those of the whole batch, see
            :mod:`twoview.training.gradient_caching`.
        clip: largest norm of the gradient, > 0; None for no clipping.
        compile: whether to compile the backbone, its momentum copy and the augmentation by ``torch.compile``; "auto"
            does so on CUDA. Compilation takes about a minute at the start.
        skip_nonfinite: largest number of batches that are skipped because the loss is not finite, >= 0; a further such
            batch ends the run with an error. Above 0, every step waits for its loss. At 0, an accelerator reads the
            losses of several steps together and before every save.
        timeout: minutes that a process waits for the other processes of the run before it ends, > 0. It must exceed the
            time of a kNN check, which rank 0 does alone.
        log_every: number of optimizer steps between logged values, >= 1.
        check_every: number of epochs between checks of the features (effective rank, kNN), >= 0; 0 for no checks.

    Raises:
        UserError: if a value is out of range.

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
    micro_batch: int | None = None
    clip: float | None = None
    compile: bool | str = "auto"
    skip_nonfinite: int = 0
    timeout: float = 30
    log_every: int = 10
    check_every: int = 10

    def __post_init__(self) -> None:
        require_choice("trainer", ("auto", "cpu", "gpu", "mps"), accelerator=self.accelerator)
        possible = self.clip is None or (isinstance(self.clip, int | float) and self.clip > 0)
        require(possible, f"trainer.clip={self.clip}: give a number above 0, or null for no limit")
        known = self.compile in (True, False, "auto")
        require(known, f"trainer.compile={self.compile}: choose auto, true or false")
        possible = isinstance(self.timeout, int | float) and 0 < self.timeout <= 1e6
        require(possible, f"trainer.timeout={self.timeout}: give a number of minutes above 0")
        limits = {"max_epochs": self.max_epochs, "max_time": self.max_time, "max_steps": self.max_steps}
        unlimited = " ".join(f"trainer.{knob}=null" for knob in limits)
        require(any(x is not None for x in limits.values()), f"{unlimited}: set one of them, so that the run ends")
        require_at_least("trainer", 1, max_epochs=self.max_epochs, max_steps=self.max_steps, devices=self.devices)
        require_at_least("trainer", 1, accumulate=self.accumulate, log_every=self.log_every)
        require_at_least("trainer", 2, micro_batch=self.micro_batch)
        require_at_least("trainer", 0, skip_nonfinite=self.skip_nonfinite, check_every=self.check_every)
        _ = self.seconds

    @property
    def seconds(self) -> float | None:
        """``max_time`` in seconds; None without ``max_time``."""
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
