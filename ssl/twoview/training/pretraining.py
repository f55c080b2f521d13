"""A pretraining run: check all settings, then train."""

import copy
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import Dataset

from twoview.backbones import build_arguments, check_patches
from twoview.data import ImageData, from_dataset, read_groups, split_holdout
from twoview.data.splits import DefaultBatch
from twoview.devices import device_capability, device_name
from twoview.encoder import Encoder, ModelCard, hidden_labels, versions
from twoview.errors import require
from twoview.files import write_atomically
from twoview.methods import Method
from twoview.negatives import NegativeQueue
from twoview.optim import describe_groups
from twoview.schedules import require_warmup_fits
from twoview.training import callbacks
from twoview.training.checkpoints import newest
from twoview.training.compilation import compiled, should_compile
from twoview.training.gradient_caching import check_micro_batch
from twoview.training.lightning_internals import batches_completed, keep_csv_rows
from twoview.training.loader import PretrainingData
from twoview.training.module import Pretraining
from twoview.training.resume import Conditions, check_resume
from twoview.training.settings import Recipe, RunSettings, TrainerSettings
from twoview.training.trainer import build_trainer, fit

log = logging.getLogger(__name__)

Data = ImageData | Callable[..., ImageData] | Dataset[Any]


@dataclass(frozen=True)
class Prepared:
    """A checked run that has not written any file yet.

    Attributes:
        encoder: backbone to train, with preprocessing.
        images: images of the run.
        module: Lightning module with the method and the augmentation.
        trainer: Lightning Trainer.
        run: run settings.
        compile: whether the networks are compiled.
    """

    encoder: Encoder
    images: ImageData
    module: Pretraining
    trainer: L.Trainer
    run: RunSettings
    compile: bool

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0."""
        return self.trainer.is_global_zero

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.trainer.strategy.root_device


def prepare(data: Data, recipe: Recipe, settings: TrainerSettings, run: RunSettings, holdout: float) -> Prepared:
    """Build the networks, load the images, and check all settings.

    Args:
        data: images; or a function that loads images, called after the networks have been built; or a torch Dataset of
            images, see :func:`twoview.data.from_dataset`.
        recipe: method, networks, augmentation, optimizer and schedule.
        settings: length, devices and precision.
        run: folder, seed and loggers.
        holdout: share of the training labels that is hidden from training and used for kNN checks, in (0, 1).

    Raises:
        UserError: if settings do not fit each other, the images or this machine.
    """
    run_dir = Path(run.run_dir)
    L.seed_everything(run.seed, workers=True, verbose=False)
    network, width = recipe.backbone()
    architecture = build_arguments(network)
    check_patches(network, architecture["image_size"])
    method = recipe.method(network, recipe.head(width))
    images = _load(data, architecture)
    missing = f"{images.name} has none; give labels, or choose a method without them"
    unused = images.train is not None or not method.uses_labels
    require(unused, f"method: {type(method).__name__} uses labels, {missing}")
    card = _card(architecture, method, images, run.seed, holdout)
    encoder = Encoder(method.backbone, card)
    views = recipe.augment(**images.view_limits())
    save = callbacks.SaveCheckpoints(run_dir / "checkpoints")
    signals, logger = callbacks.SignalHandler(save), callbacks.TrainingLogger(settings.log_every)
    check = _feature_check(encoder, images, holdout, save, settings.check_every)
    if getattr(method, "group_file", None) is not None:  # groups take the place of labels in the batches
        groups = read_groups(str(method.group_file), images.pretrain)
        images = copy.copy(images)  # those of the caller keep their labels
        vars(images).pop("fingerprint", None)
        images.pretrain = images.pretrain.with_labels(groups)
    limit = [callbacks.TimeLimit(settings.seconds)] if settings.seconds is not None else []
    hooks = [logger, check, save, signals, callbacks.ProgressBar(logger), callbacks.KeepMemory(), *limit]
    trainer = build_trainer(settings, network, hooks, run.loggers, run_dir)
    _check_devices(trainer, method, images)
    _check_batches(settings, method, images, trainer.world_size)
    _check_warmup(recipe, settings, images)
    device = trainer.strategy.root_device
    compiles = should_compile(settings.compile, device)
    conditions = _conditions(trainer, settings, images, run, recipe.optimizer.name, compiles)
    batch = images.batch_size * settings.accumulate
    module = Pretraining(
        *(method, views, recipe.optimizer, recipe.schedule, batch, card, conditions),
        skip_nonfinite=settings.skip_nonfinite,
        micro_batch=settings.micro_batch,
    )
    module.on_step_boundary = signals.stop_if_asked
    if device.type != "cpu":  # which works asynchronously
        signals.every = settings.log_every
        module.losses.every = 1 if settings.skip_nonfinite else min(50, settings.log_every * settings.accumulate)
    return Prepared(encoder, images, module, trainer, run, compiles)


def train(prepared: Prepared) -> dict[str, Any]:
    """Train, starting from the last checkpoint if the run is resumed.

    Args:
        prepared: a run from :func:`prepare`.

    Returns:
        Values for the report by name, such as ``epochs``, ``steps``, ``images_seen`` and ``seconds``.

    Raises:
        UserError: if the checkpoint cannot be resumed, or training diverges or runs out of memory.
        Interrupted: if a signal stopped the run; a checkpoint has been saved.
    """
    run, module, trainer, images = prepared.run, prepared.module, prepared.trainer, prepared.images
    run_dir = Path(run.run_dir)
    stopped = newest(run_dir) if run.resume and not run.rerun else None
    if stopped is not None:
        module.changes = check_resume(stopped, module, module.conditions, run_dir, run.exact)
        keep_csv_rows(trainer.loggers, stopped["global_step"])
        log.info("continuing after step %d of %s", stopped["global_step"], stopped["path"])
    for name, text in run.files.items() if prepared.is_main else ():
        write_atomically(run_dir / name, text)
    if images.broken and prepared.is_main:
        lines = "".join(f"{name}\t{reason}\n" for name, reason in images.broken)
        write_atomically(run_dir / "broken.txt", lines)
        log.info("data: %d files were left out, listed in %s", len(images.broken), run_dir / "broken.txt")
    optimizer = module.configure_optimizers()  # only to describe it; the Trainer builds another one
    _log_start(prepared, optimizer)
    start = time.perf_counter()
    with compiled(module.method, prepared.compile, module.augment.compilable):
        fit(trainer, module, PretrainingData(images, run.seed), stopped["path"] if stopped else None)
    seen = batches_completed(trainer) * images.batch_size
    return {
        "epochs": round(seen / len(images.pretrain), 2),
        "steps": trainer.global_step - module.batches_without_step,
        "images_seen": seen,
        "batches_not_finite": module.skipped,
        "batches_without_step": module.batches_without_step,
        "seconds": round(time.perf_counter() - start, 1),
        "batch_size": images.batch_size,
        "precision": str(trainer.precision),
        "device": device_name(prepared.device),
        "processes": trainer.world_size,
        "base_lr": optimizer.param_groups[0]["base_lr"],
        **({"changes": module.changes} if module.changes else {}),
    }


def _load(data: Data, architecture: dict[str, Any]) -> ImageData:
    channels, size = architecture["in_chans"], architecture["image_size"]
    if isinstance(data, Dataset):
        data = from_dataset(data, size, channels)
    images = data() if callable(data) else data
    found, batch, number = images.image_size, images.batch_size, len(images.pretrain)
    message = f"images of {images.channels}x{found}x{found} do not fit a backbone"
    fit = (images.channels, found) == (channels, size)
    require(fit, f"data: {message} made for in_chans={channels}, image_size={size}")
    require(number > 1, f"data: {images.name} has {number} image to learn from; contrastive learning needs at least 2")
    message = f"{images.name} has {number} images to learn from; choose 2 to {number}"
    require(2 <= batch <= number, f"data.batch_size={batch}: {message}")
    return images


def _feature_check(
    encoder: Encoder, images: ImageData, holdout: float, save: callbacks.SaveCheckpoints, every: int
) -> callbacks.FeatureCheck:
    """Build the feature check, and hide the labels of the held-out images from pretraining."""
    fitted, held_out = torch.arange(len(images.pretrain)), None
    if images.train is not None:
        fitted, held_out = split_holdout(images.train.labels, holdout, encoder.card.seed)
        images.hide_labels(held_out)
    labelled = images.train or images.pretrain
    return callbacks.FeatureCheck(encoder, labelled, fitted, held_out, len(images.classes), save, every)


def _card(architecture: dict[str, Any], method: Method, images: ImageData, seed: int, holdout: float) -> ModelCard:
    mean, std = images.mean_std
    labelled = images.train if method.uses_labels else None
    return ModelCard(
        method=type(method).__name__,
        backbone=architecture,
        image_size=images.image_size,
        channels=images.channels,
        store_size=images.store_size,
        resize_size=images.resize_size,
        mean=tuple(mean),
        std=tuple(std),
        data=images.name,
        classes=tuple(images.classes),
        seed=seed,
        versions=versions(),
        hidden_labels=None if labelled is None else hidden_labels(labelled.labels, holdout),
    )


def _check_devices(trainer: L.Trainer, method: Method, images: ImageData) -> None:
    world, device = trainer.world_size, trainer.strategy.root_device.type
    _divide_default_batch(images, world)
    message = f"cannot be divided among {world} processes; choose a multiple of their number"
    require(images.batch_size % world == 0, f"data.batch_size={images.batch_size}: {message}")
    number, accumulated = len(images.pretrain) // images.batch_size, trainer.accumulate_grad_batches
    require(accumulated <= number, f"trainer.accumulate={accumulated}: an epoch has {number} batches; choose fewer")
    cores = os.cpu_count() or 1
    if device == "cpu" and trainer.num_devices > cores:
        log.warning(
            "trainer.devices=%d: more processes than cores (%d), so training is slow", trainer.num_devices, cores
        )
    unsynced = method.bn != "sync" or device == "cuda"
    require(unsynced, f"method.bn=sync: needs a GPU, not {device}; choose plain or split")


def _check_batches(settings: TrainerSettings, method: Method, images: ImageData, world: int) -> None:
    if settings.micro_batch is not None:
        check_micro_batch(settings.micro_batch, method, images.batch_size // world, world)
    if settings.accumulate > 1 and method.in_batch:
        log.info(
            "trainer.accumulate=%d: adds no negatives, since %s compares the images of one batch; a larger "
            "data.batch_size adds negatives, and fits in memory with trainer.micro_batch=N",
            *(settings.accumulate, type(method).__name__),
        )


def _divide_default_batch(images: ImageData, world: int) -> None:
    """Reduce a batch size that was not chosen to a multiple of the number of processes."""
    if isinstance(images.batch_size, DefaultBatch):
        number, fitting = len(images.pretrain), images.batch_size // world * world
        message = f"{images.name} has {number} images to learn from; choose fewer processes"
        require(fitting, f"trainer.devices: {world} processes, but {message}")
        if fitting < images.batch_size:
            log.info("data: data.batch_size is %d, the largest multiple of %d processes", fitting, world)
        images.batch_size = fitting  # a plain number, which checkpoints can hold


def _check_warmup(recipe: Recipe, settings: TrainerSettings, images: ImageData) -> None:
    steps_per_epoch = math.ceil(len(images.pretrain) // images.batch_size / settings.accumulate)
    lengths: dict[str, float] = {}
    if settings.max_epochs is not None:
        lengths[f"trainer.max_epochs={settings.max_epochs}"] = settings.max_epochs
    if settings.max_steps is not None:
        epochs = settings.max_steps / steps_per_epoch
        lengths[f"trainer.max_steps={settings.max_steps} ({epochs:.3g} epochs)"] = epochs
    require_warmup_fits(recipe.schedule, lengths)


def _conditions(
    trainer: L.Trainer, settings: TrainerSettings, images: ImageData, run: RunSettings, optimizer: str, compiles: bool
) -> Conditions:
    conditions = {
        "seed": run.seed,
        "data.batch_size": images.batch_size,
        "trainer.accumulate": settings.accumulate,
        "trainer.micro_batch": settings.micro_batch,
        "trainer.precision": str(trainer.precision),
        "trainer.compile": compiles,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
        "device": device_capability(trainer.strategy.root_device),
        "data": images.fingerprint,
        "torch": str(torch.__version__),
        "optimizer": optimizer,
    }
    length = {knob: getattr(settings, knob) for knob in ("max_epochs", "max_time", "max_steps")}
    return Conditions(conditions, length, run.identity, dict(run.knobs))


def _log_start(prepared: Prepared, optimizer: torch.optim.Optimizer) -> None:
    for line in describe_groups(optimizer):
        log.info("%s", line)
    card, images = prepared.encoder.card, prepared.images
    number, size = len(images.pretrain), images.batch_size
    where = f"batch {size}, {prepared.device}, {prepared.trainer.precision}"
    log.info("%s on %s: %s images, %s, %s", card.method, images.name, f"{number:,}", card.backbone["name"], where)
    for module in prepared.module.modules():
        if isinstance(module, NegativeQueue) and len(module.keys) > number:
            message = "method.queue_size=%d: larger than the data set of %d images, so images are stored more than once"
            log.info(message, len(module.keys), number)
