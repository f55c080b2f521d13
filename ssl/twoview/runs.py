"""What a user does with twoview, as plain typed functions: pretrain, judge, preview. No configuration system here."""

import contextlib
import csv
import json
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist
from torch import nn
from torch.utils.data import Dataset

from twoview import __version__, records
from twoview.augment import TwoViews
from twoview.backbones import build_arguments, create_backbone
from twoview.checkpoints import AtomicCheckpointIO, SaveCheckpoints, newest
from twoview.data import ImageData, Preprocess, fit_size, from_dataset
from twoview.errors import UserError
from twoview.evaluate import Protocol, split_holdout
from twoview.finetune import finetune
from twoview.interrupts import Interrupts
from twoview.judging import evaluate, judged, knn, linear_probe
from twoview.methods import Method
from twoview.monitors import Bar, FeatureCheck, TimeLimit, Watch
from twoview.optim import Optimization, describe_groups
from twoview.pretrain import Pretraining, choose_precision
from twoview.records import pick_device
from twoview.report import compare, picture_of_views

__all__ = ["Training", "compare", "evaluate", "finetune", "knn", "linear_probe", "pretrain", "preview"]

log = logging.getLogger(__name__)

SELECTABLE = ("val/linear_top1", "val/knn_top1")


@dataclass(frozen=True)
class Training:
    """How long and on what a run trains.

    Args:
        max_epochs: greatest number of passes over the images; None for no limit but ``max_time`` or ``max_steps``.
        max_time: greatest time for training, as "15m", "2h", "90s" or "HH:MM:SS"; it becomes a number of steps.
        max_steps: greatest number of optimiser steps, such as that which ``max_time`` came to in another run.
        accelerator: "auto", "cpu", "gpu" or "mps".
        devices: processes, one device each.
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed"; see :func:`twoview.pretrain.choose_precision`.
        accumulate: batches in one optimiser step; adds no negatives.
        clip: greatest norm of the gradient, None for no limit.
        skip_nonfinite: greatest number of batches that are left out because their loss is not finite; one more ends
            the run.
        log_every: steps between logged figures.
        check_every: epochs between kNN checks of the features, 0 for none.

    Raises:
        UserError: a value out of range.
    """

    max_epochs: int | None = 100
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
        if self.accelerator not in ("auto", "cpu", "gpu", "cuda", "mps"):
            raise UserError(f"trainer.accelerator={self.accelerator}: choose auto, cpu, gpu or mps")
        if self.clip is not None and not (isinstance(self.clip, int | float) and self.clip > 0):
            raise UserError(f"trainer.clip={self.clip}: give a number above 0, or null for no limit")
        if self.max_epochs is None and self.max_time is None and self.max_steps is None:
            raise UserError(
                "trainer.max_epochs=null trainer.max_time=null trainer.max_steps=null: give one, or the run has no end"
            )
        for knob, least in (
            ("max_epochs", 1),
            ("max_steps", 1),
            ("devices", 1),
            ("accumulate", 1),
            ("skip_nonfinite", 0),
            ("log_every", 1),
            ("check_every", 0),
        ):
            value = getattr(self, knob)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise UserError(f"trainer.{knob}={value}: give a whole number, at least {least}")
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
        if not 0 < seconds < math.inf:
            raise UserError(f"trainer.max_time={text}: give a time above 0 such as 15m, 2h, 90s or 01:30:00")
        return seconds


def pretrain(
    data: ImageData | Callable[[], ImageData] | Dataset[Any],
    method: Callable[[nn.Module, nn.Module], Method],
    backbone: Mapping[str, Any],
    head: Callable[[int], nn.Module],
    augment: Callable[..., TwoViews],
    optimization: Optimization,
    schedule: Callable[[float, float], float],
    training: Training | None = None,
    protocol: Protocol | None = None,
    loggers: Sequence[Any] | Mapping[str, Any] = (),
    seed: int = 0,
    run_dir: str | Path = "run",
    resume: object = False,
    exact: bool = True,
    identity: str | None = None,
    rerun: bool = False,
) -> dict[str, Any]:
    """Pretrain a backbone without labels, then judge its features.

    A run that was stopped goes on to the last digit of the uninterrupted one: image order, augmentation, schedules and
    momentum are functions of seed and step, and all other state is in the checkpoint.

    Args:
        data: the images; or what loads them, called after everything cheap has been checked; or your own torch
            Dataset of pictures, see :func:`twoview.data.from_dataset` (which also takes a test set and a batch size).
        method: makes a method of a backbone and a head, such as ``twoview.methods.SimCLR``.
        backbone: arguments of :func:`twoview.backbones.create_backbone`; channels and size must be those of the images.
        head: makes a head for features of a width.
        augment: makes the views, such as ``TwoViews``; called with the images' ``view_limits``.
        optimization: the optimiser to be.
        schedule: ``(epoch, epochs) -> factor`` of the learning rate.
        training: how long and on what.
        protocol: how the features are judged; None for not at all.
        loggers: Lightning loggers, by name or not.
        seed: of initialisation, image order, augmentation and held-out split.
        run_dir: folder for checkpoints and ``report.json``; made if missing.
        resume: anything true to go on from the last checkpoint in ``run_dir``, if there is one.
        exact: refuse to go on where the result could differ: other data, seed, batch size, number of processes or
            threads, precision, device or torch.
        identity: anything that says what all the arguments are. A report in ``run_dir`` of the same identity, data and
            version of twoview is then returned as it is, and a run that was stopped during its evaluation repeats that.
        rerun: begin anew in any case; what ``run_dir`` holds of an earlier run is overwritten.

    Returns:
        The report, as written to ``report.json``; of several processes, the first one's alone, the others' are empty.

    Raises:
        UserError: a mistake in the arguments, before training starts.
        twoview.errors.Interrupted: a signal asked the run to stop; it has been saved.
    """
    training, run_dir = training or Training(), Path(run_dir)
    L.seed_everything(seed, workers=True, verbose=False)
    network, width = create_backbone(**backbone)
    built = method(network, head(width))
    architecture = build_arguments(network)
    if isinstance(data, Dataset):
        data = from_dataset(data, architecture["image_size"], architecture["in_chans"])
    images = data() if callable(data) else data
    if (images.channels, images.image_size) != (
        architecture["in_chans"],
        architecture["image_size"],
    ):
        raise UserError(
            f"data: images of {images.channels}x{images.image_size}x{images.image_size} do not fit a backbone made for "
            f"in_chans={architecture['in_chans']}, image_size={architecture['image_size']}"
        )
    if not 2 <= images.batch_size <= len(images.pretrain):
        raise UserError(
            f"data.batch_size={images.batch_size}: {images.name} has {len(images.pretrain)} images to learn from; "
            f"choose 2 to {len(images.pretrain)}"
        )
    images.seed = seed
    mean, std = images.mean_std
    views = augment(**images.view_limits)
    card = {
        "backbone": architecture,
        "method": type(built).__name__,
        "data": images.name,
        "mean": mean,
        "std": std,
        "image_size": images.image_size,
        "store_size": images.pretrain.size,
        "channels": images.channels,
        "classes": images.classes,
        "seed": seed,
        "versions": records.versions(),
        "length": {knob: getattr(training, knob) for knob in ("max_epochs", "max_time", "max_steps")},
    }
    global_batch = images.batch_size * training.accumulate
    module = Pretraining(
        built, views, optimization, schedule, global_batch, seed, card, skip_nonfinite=training.skip_nonfinite
    )
    preprocess = Preprocess(images.image_size, mean, std, images.pretrain.size)
    save = SaveCheckpoints(run_dir / "checkpoints")
    fit, held = torch.arange(len(images.pretrain)), None
    if images.train is not None:
        fit, held = split_holdout(images.train.labels, (protocol or Protocol()).holdout, seed)
        images.hide_labels(held)
    check = FeatureCheck(
        images.train or images.pretrain, fit, held, len(images.classes), preprocess, save, training.check_every
    )
    interrupts = Interrupts(save)
    module.at_rest = interrupts.stop_if_asked
    callbacks: list[L.Callback] = [Watch(training.log_every), check, save, interrupts, Bar()]
    trainer = _trainer(training, network, callbacks, loggers, run_dir)
    device = trainer.strategy.root_device
    if images.batch_size % trainer.world_size:
        raise UserError(
            f"data.batch_size={images.batch_size}: cannot be divided among {trainer.world_size} processes; choose a "
            "multiple of their number"
        )
    if built.bn == "sync" and device.type != "cuda":
        raise UserError(f"method.bn=sync: needs a GPU, not {device.type}; choose plain or split")
    card["conditions"] = {
        "seed": seed,
        "data.batch_size": images.batch_size,
        "trainer.accumulate": training.accumulate,
        "trainer.precision": str(trainer.precision),
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
        "device": _capability(device),
        "data": images.fingerprint,
        "torch": str(torch.__version__),
    }
    card["identity"] = identity
    finished = None if rerun or identity is None else _finished(run_dir, card)
    if finished is not None:
        log.info("%s: this run is finished, nothing is repeated; rerun=true would", run_dir)
        return finished
    with _alone(run_dir) if trainer.is_global_zero else contextlib.nullcontext():
        stopped = newest(run_dir) if resume and not rerun else None
        if stopped is not None:
            _check_resume(stopped, module, run_dir, exact)
            _keep_rows(trainer.loggers, stopped["global_step"])
            log.info("going on after step %d of %s", stopped["global_step"], stopped["path"])
        if images.broken and trainer.is_global_zero:
            run_dir.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{name}\t{reason}\n" for name, reason in images.broken)
            (run_dir / "broken.txt").write_text(lines, encoding="utf-8", errors="backslashreplace")
            log.info("data: %d files were left out, listed in %s", len(images.broken), run_dir / "broken.txt")
        optimizer = optimization.build(built, global_batch)  # as the Trainer will build it
        for line in describe_groups(optimizer):
            log.info("%s", line)
        log.info(
            "%s on %s: %s images, %s, batch %d, %s, %s",
            card["method"],
            images.name,
            f"{len(images.pretrain):,}",
            backbone["name"],
            images.batch_size,
            device,
            trainer.precision,
        )
        queue = getattr(built, "queue", None)
        if queue is not None and len(queue.keys) > len(images.pretrain):
            log.info(
                "method.queue_size=%d: larger than the data set of %d images, so it holds images several times",
                len(queue.keys),
                len(images.pretrain),
            )
        start = time.perf_counter()
        environment, threads = dict(os.environ), torch.get_num_threads()
        try:
            trainer.fit(module, datamodule=images, ckpt_path=stopped["path"] if stopped else None, weights_only=True)
        except (MemoryError, RuntimeError) as error:
            words = re.search("out of memory|allocate memory|alloc_failed", str(error), re.IGNORECASE)
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not words:
                raise
            raise UserError(
                f"data.batch_size={images.batch_size}: out of memory; try a smaller data.batch_size, "
                "data.image_size or backbone.name, or trainer.precision=bf16-mixed"
            ) from error
        finally:
            if trainer.world_size > 1 and dist.is_initialized():
                # Whoever comes after in this process is alone again, with all threads.
                dist.destroy_process_group()
                os.environ.clear()
                os.environ.update(environment)
                torch.set_num_threads(threads)
        seconds = time.perf_counter() - start
        if not trainer.is_global_zero:
            return {}  # the evaluation is one process's work
        seen = trainer.fit_loop.epoch_loop.batch_progress.total.completed * images.batch_size
        report = records.begin("pretrain", card, seed, run_dir) | {
            "identity": identity,
            "data_fingerprint": images.fingerprint,
            "training": {
                "epochs": round(seen / len(images.pretrain), 2),
                "steps": trainer.global_step - module.batches_without_step,
                "images_seen": seen,
                "batches_not_finite": module.skipped,
                "batches_without_step": module.batches_without_step,
                "seconds": round(seconds, 1),
                "batch_size": images.batch_size,
                "precision": str(trainer.precision),
                "device": records.device_name(device),
                "processes": trainer.world_size,
                "base_lr": optimizer.param_groups[0]["base_lr"],
            },
        }
        if protocol is not None and images.train is not None:
            return judged(report, network, preprocess, card, images, protocol, views, seed, run_dir, device)
        return records.write(report, run_dir)


def preview(
    data: ImageData | Callable[[], ImageData],
    augment: Callable[..., TwoViews],
    images: int = 8,
    pairs: int = 4,
    seed: int = 0,
    run_dir: str | Path = "run",
) -> Path:
    """Write ``views.png``: a row an image, the original first, then pairs of its two views.

    Args:
        data: the images, or what loads them.
        augment: makes the views, as for :func:`pretrain`.
        images: rows.
        pairs: pairs of views in a row.
        seed: of the views.
        run_dir: folder for the picture; made if missing.

    Returns:
        Path of the picture.
    """
    for knob, value in (("images", images), ("pairs", pairs)):
        if value < 1:
            raise UserError(f"{knob}={value}: must be at least 1")
    loaded = data() if callable(data) else data
    views = augment(**loaded.view_limits)
    pixels = fit_size(
        loaded.pretrain[torch.linspace(0, len(loaded.pretrain) - 1, min(images, len(loaded.pretrain))).long()].pixels,
        loaded.image_size,
    )
    path = Path(run_dir) / "views.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_of_views(pixels, views, pairs, seed).save(path)
    log.info("originals on the left, then %d pairs of views: %s", pairs, path)
    return path


def _check_resume(stopped: Mapping[str, Any], module: Pretraining, run_dir: Path, exact: bool) -> None:
    card = stopped["twoview"]
    mine = {name: list(value.shape) for name, value in module.state_dict().items()}
    if mine != {name: list(value.shape) for name, value in stopped["state_dict"].items()}:
        raise UserError(f"resume={run_dir}: its networks are other ones; give the run's own backbone, head and method")
    ended = stopped["global_step"] >= card["total_steps"] and card["length"] == module.card["length"]
    if ended and (run_dir / "report.json").exists() and module.card["identity"] is None:
        raise UserError(
            f"resume={run_dir}: this run is finished, after {stopped['global_step']} steps; raise trainer.max_epochs "
            "to go on"
        )
    now = module.card["conditions"]
    differ = [f"{name} was {value}, is {now[name]}" for name, value in card["conditions"].items() if value != now[name]]
    if differ and exact:
        raise UserError(
            f"resume={run_dir}: would not come to the same result ({'; '.join(differ)}); make them equal, go on "
            "regardless with resume.exact=false, or begin anew with rerun=true"
        )
    if differ:
        log.warning("resume: not exact (%s)", "; ".join(differ))


def _finished(run_dir: Path, card: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of a run of the same configuration, data and version, if it came to its end."""
    try:
        report: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    except (OSError, ValueError):
        return None
    found = (report.get("identity"), report.get("data_fingerprint"), report.get("versions", {}).get("twoview"))
    return report if found == (card["identity"], card["conditions"]["data"], __version__) else None


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a folder; no bar where a system has no such locks."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "lock").open("w")
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written ({error.strerror}); mend it, or choose another folder") from error
    with file:
        try:
            import fcntl  # not on Windows

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: loader workers do not inherit it
        except BlockingIOError as error:
            raise UserError(f"{run_dir}: another process is at work in this folder; wait for it, or stop it") from error
        except (ImportError, OSError):
            pass
        yield


def _keep_rows(loggers: Sequence[Any], step: int) -> None:
    """Let metrics.csv go on: Lightning's logger deletes what a folder holds."""
    for logger in loggers:
        file = Path(logger.log_dir) / "metrics.csv" if isinstance(logger, CSVLogger) else None
        if file is not None and file.exists():
            with file.open(newline="") as handle:
                rows = [row for row in csv.DictReader(handle) if int(row["step"]) < step]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logger.experiment.metrics = rows


def _trainer(
    training: Training, network: nn.Module, callbacks: list[L.Callback], loggers: Any, run_dir: Path
) -> L.Trainer:
    if training.seconds is not None:
        callbacks.append(TimeLimit(training.seconds))
    nodes = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // here
        if here != training.devices:
            raise UserError(
                f"trainer.devices={training.devices}: torchrun has started {here} processes here; give trainer=ddp "
                f"trainer.devices={here}"
            )
    # What Lightning says at start is for its own users; loader workers are a choice here, not an oversight.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore",
        ".*(does not have many workers|ended before the epoch ended|Experiment logs|LeafSpec|logging interval|"
        "broadcast_buffers|sync_dist=True).*",
    )
    try:
        return L.Trainer(
            accelerator=training.accelerator,
            devices=training.devices,
            num_nodes=nodes,
            # Buffers need no broadcast: queues are the same on every rank, statistics its own.
            strategy=DDPStrategy(broadcast_buffers=False) if nodes * training.devices > 1 else "auto",
            precision=choose_precision(training.precision, network, pick_device(training.accelerator)),  # type: ignore[arg-type]
            max_epochs=training.max_epochs or -1,
            max_steps=training.max_steps or -1,
            accumulate_grad_batches=training.accumulate,
            gradient_clip_val=training.clip,
            log_every_n_steps=training.log_every,
            callbacks=callbacks,
            logger=list(loggers.values() if isinstance(loggers, Mapping) else loggers),
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=run_dir,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"trainer.accelerator={training.accelerator} trainer.devices={training.devices} "
            f"trainer.precision={training.precision}: {str(error).splitlines()[0]}"
        ) from error


def _capability(device: torch.device) -> str:
    if device.type == "cuda":
        return records.device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
