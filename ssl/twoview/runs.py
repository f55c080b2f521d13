"""Public API: functions to pretrain, evaluate, fine-tune, compare and preview, without a configuration system."""

import contextlib
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from twoview.augment import TwoViews
from twoview.data import ImageData
from twoview.devices import pick_device
from twoview.encoder import Encoder
from twoview.errors import require
from twoview.evaluation.compare import compare as compare_runs, comparison_tables
from twoview.evaluation.finetune import FineTuning, Supervised, finetune as finetune_encoder
from twoview.evaluation.settings import MEASURES, EvaluationSettings
from twoview.files import exclusive, write_atomically
from twoview.loading import load
from twoview.optim import OptimizerSettings
from twoview.reporting import evaluation, figures, files, pages, record, tables
from twoview.schedules import warmup_cosine
from twoview.training.pretraining import Data, prepare, train
from twoview.training.resume import check_folder, finished_report
from twoview.training.settings import Recipe, RunSettings, TrainerSettings

__all__ = ["compare", "evaluate", "finetune", "knn", "linear_probe", "pretrain", "preview"]

log = logging.getLogger(__name__)

Folder = str | Path
Source = Encoder | str | Path
Images = ImageData | Callable[..., ImageData]
Report = dict[str, Any]  # the content of report.json
SELECTABLE = ("val/linear_top1", "val/knn_top1")
FULL = EvaluationSettings.from_knobs(parts=[name for name in MEASURES if name != "linear_sgd"])


def pretrain(
    data: Data,
    recipe: Recipe | None = None,
    trainer: TrainerSettings | None = None,
    settings: EvaluationSettings | None = EvaluationSettings(),  # noqa: B008 (frozen)
    run: RunSettings | None = None,
) -> Report:
    """Pretrain a backbone without labels, then evaluate its features.

    A resumed run gives the same result as an uninterrupted run: image order, augmentation, schedules and momentum are
    functions of seed and step, and all other state is in the checkpoint.

    Args:
        data: images; or a function that loads images, called after the networks have been built; or a torch
            Dataset of images. Use :func:`twoview.data.from_dataset` to add a test set or set the batch size.
        recipe: method, backbone, head, augmentation, optimizer and schedule; None for SimCLR.
        trainer: length, devices and precision; None for the default settings.
        settings: evaluation settings; None for no evaluation. Images without labels are not evaluated.
        run: folder, seed, loggers, and whether an earlier run is resumed; None for the default settings.

    Returns:
        The content of ``report.json`` on rank 0; an empty mapping on the other ranks.

    Raises:
        UserError: if the arguments are invalid, or training diverges or runs out of memory.
        twoview.errors.Interrupted: if a signal stopped the run; a checkpoint has been saved. If Ctrl-C stopped the
            evaluation, the report with the finished parts has been written.

    Example:
        >>> from functools import partial
        >>> from twoview.backbones import create_backbone
        >>> from twoview.data import digits
        >>> recipe = Recipe(backbone=partial(create_backbone, "test_resnet", in_chans=1, image_size=16))
        >>> report = pretrain(
        ...     partial(digits, image_size=16), recipe, TrainerSettings(max_steps=2), None, RunSettings(run_dir=folder)
        ... )
        >>> report["training"]["steps"], load(folder).card.method
        (2, 'SimCLR')
    """
    run = run or RunSettings()
    run_dir = Path(run.run_dir)
    holdout = (settings or EvaluationSettings()).holdout
    prepared = prepare(data, recipe or Recipe(), trainer or TrainerSettings(), run, holdout)
    finished = None if run.rerun else finished_report(run_dir, prepared.module.conditions)
    if finished is not None and tables.is_readable(finished):
        log.info("%s: this run is finished and is not repeated; rerun=true would repeat it", run_dir)
        return finished
    check_folder(run_dir, None if run.rerun or run.resume else run.identity)
    below = (run_dir / "checkpoints", run_dir / ".hydra")
    with exclusive(run_dir, *below) if prepared.is_main else contextlib.nullcontext():
        facts = train(prepared)
        if not prepared.is_main:
            return {}
        images = prepared.images
        report = _begin("pretrain", prepared.encoder, images, run.seed, run_dir)
        report |= {"identity": run.identity, "data_fingerprint": images.fingerprint, "training": facts}
        if settings is None or images.train is None:
            return record.write(report, run_dir)
        return _evaluate(report, prepared.encoder.to(prepared.device), images, prepared.module.augment, settings)


def evaluate(
    encoder: Source,
    data: Images,
    settings: EvaluationSettings = FULL,
    augment: Callable[..., TwoViews] = TwoViews,
    seed: int = 0,
    run_dir: Folder = "run",
    task: str = "evaluate",
) -> Report:
    """Evaluate a backbone on labeled images and, as baselines, random initialization and raw pixels.

    Args:
        encoder: an encoder, or a source for :func:`twoview.load`.
        data: labeled images, or a function that loads them, called with ``image_size`` and ``channels``.
        settings: evaluation settings; by default all measures except ``linear_sgd``.
        augment: builds the views for the alignment metric; use the same for all networks that are compared.
        seed: seed of the held-out split, of random initialization and of all other random draws.
        run_dir: folder for ``report.json``, ``report.md``, ``report.html`` and further files; created if missing.
        task: name of the task in the report; the Markdown and HTML reports are written for "evaluate" only.

    Returns:
        The content of ``report.json``.

    Raises:
        UserError: if there is no such checkpoint, or the images do not fit the network.
        twoview.errors.Interrupted: if Ctrl-C was pressed; the report with the finished parts has been written.

    Example:
        >>> from twoview.data import digits
        >>> encoder = load("random:test_resnet", image_size=16, channels=1)
        >>> few = EvaluationSettings.from_knobs(parts=["knn"], k=[5], bootstrap=100, baselines=False)
        >>> report = evaluate(encoder, digits, few, run_dir=folder)
        >>> report["results"]["trained"]["knn"]["k"]
        5
    """
    encoder, images = _open(encoder, data, seed)
    report = _begin(task, encoder, images, seed, Path(run_dir))
    return _evaluate(report, encoder.to(pick_device()), images, _views(augment, encoder, images), settings)


def linear_probe(
    encoder: Source, data: Images, settings: EvaluationSettings | None = None, seed: int = 0, run_dir: Folder = "run"
) -> Report:
    """Run :func:`evaluate` with linear probes only, and return the content of ``report.json``.

    Args:
        encoder: an encoder, or a source for :func:`twoview.load`.
        data: labeled images, or a function that loads them, called with ``image_size`` and ``channels``.
        settings: evaluation settings, reduced to its linear probes; None for the default settings.
        seed: seed of the held-out split, of random initialization and of all other random draws.
        run_dir: folder for ``report.json`` and further files; created if missing.

    Raises:
        UserError: if there is no such checkpoint, or the images do not fit the network.

    Example:
        >>> from twoview.data import digits
        >>> few = EvaluationSettings.from_knobs(l2=[0.01], bootstrap=100, baselines=False)
        >>> encoder = load("random:test_resnet", image_size=16, channels=1)
        >>> list(linear_probe(encoder, digits, few, run_dir=folder)["results"]["trained"])
        ['linear']
    """
    only = (settings or EvaluationSettings()).only("linear", "linear_without_bn", "linear_sgd")
    return evaluate(encoder, data, only, seed=seed, run_dir=run_dir, task="linear_probe")


def knn(
    encoder: Source, data: Images, settings: EvaluationSettings | None = None, seed: int = 0, run_dir: Folder = "run"
) -> Report:
    """Run :func:`evaluate` with k nearest neighbors (kNN) only, and return the content of ``report.json``.

    Args:
        encoder: an encoder, or a source for :func:`twoview.load`.
        data: labeled images, or a function that loads them, called with ``image_size`` and ``channels``.
        settings: evaluation settings, reduced to the kNN measure; None for the default settings.
        seed: seed of the held-out split, of random initialization and of all other random draws.
        run_dir: folder for ``report.json`` and further files; created if missing.

    Raises:
        UserError: if there is no such checkpoint, or the images do not fit the network.

    Example:
        >>> from twoview.data import digits
        >>> few = EvaluationSettings.from_knobs(k=[1], bootstrap=100, baselines=False)
        >>> encoder = load("random:test_resnet", image_size=16, channels=1)
        >>> list(knn(encoder, digits, few, run_dir=folder)["results"]["trained"])
        ['knn']
    """
    only = (settings or EvaluationSettings()).only("knn")
    return evaluate(encoder, data, only, seed=seed, run_dir=run_dir, task="knn")


def finetune(
    encoder: Source,
    data: Images,
    augment: Callable[..., TwoViews] = TwoViews,
    optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 (frozen)
    schedule: Callable[[float, float], float] = warmup_cosine,
    settings: FineTuning = FineTuning(),  # noqa: B008 (frozen)
    seed: int = 0,
    run_dir: Folder = "run",
) -> Report:
    """Fine-tune a network on labels and, as a baseline, train the same network from random initialization.

    Args:
        encoder: an encoder, or a source for :func:`twoview.load`.
        data: labeled images, or a function that loads them, called with ``image_size`` and ``channels``.
        augment: builds the views; only the first view is used.
        optimizer: optimizer settings; ``lr`` is replaced by the best of ``settings.learning_rates``.
        schedule: factor of the learning rate as a function of completed and total epochs.
        settings: share of the labels, epochs and learning rates.
        seed: seed of classifier, image order, views and held-out split; which labels are used does not depend on it.
        run_dir: folder for ``report.json``; created if missing.

    Returns:
        The content of ``report.json``.

    Raises:
        UserError: if there is no such checkpoint, or the images do not fit the network.

    Example:
        >>> from twoview.data import digits
        >>> encoder = load("random:test_resnet", image_size=16, channels=1)
        >>> few = FineTuning(label_share=0.05, epochs=1, least_steps=1, learning_rates=[1e-3], supervised=False)
        >>> finetune(encoder, digits, settings=few, run_dir=folder)["protocol"]["labels"]
        70
    """
    run_dir = Path(run_dir)
    encoder, images = _open(encoder, data, seed)
    report = _begin("finetune", encoder, images, seed, run_dir)
    views = _views(augment, encoder, images)
    how = Supervised(images, views, optimizer, schedule, settings, seed, pick_device())
    found, predictions = finetune_encoder(encoder, how)
    files.write_predictions(images.labelled[1].labels, {name: p.classes for name, p in predictions.items()}, run_dir)
    return record.write(report | found | _test(images), run_dir)


def compare(runs: Sequence[Folder], seed: int = 0, run_dir: Folder = "run", resamples: int = 2000) -> Report:
    """Compare finished runs with the first one on the same test images, with paired bootstrap intervals.

    Args:
        runs: folders of two or more finished runs.
        seed: seed of the bootstrap.
        run_dir: folder for ``report.json``, ``report.md`` and ``report.html``; created if missing.
        resamples: number of resamples of the test images.

    Returns:
        The content of ``report.json``; see :func:`twoview.evaluation.compare.compare`.

    Raises:
        UserError: if there are too few runs, a run is not finished, or the test images differ.

    Example:
        >>> from twoview.data import digits
        >>> few = EvaluationSettings.from_knobs(k=[1], bootstrap=100, baselines=False)
        >>> encoders = {seed: load("random:test_resnet", image_size=16, channels=1, seed=seed) for seed in (0, 1)}
        >>> for seed, encoder in encoders.items():
        ...     report = knn(encoder, digits, few, run_dir=f"{folder}/{seed}")
        >>> comparison = compare([f"{folder}/0", f"{folder}/1"], run_dir=f"{folder}/both", resamples=100)
        >>> list(comparison["runs"][1]["differences"])
        ['knn']
    """
    run_dir = Path(run_dir)
    found = compare_runs(runs, seed, resamples)
    report = record.begin("compare", "comparison", found["backbone"], found["data"], seed, run_dir) | found
    title = f"{found['data']}: {len(found['runs'])} runs"
    pages.write_tables(title, comparison_tables(report), run_dir)
    return record.write(report, run_dir)


def preview(
    data: Images,
    augment: Callable[..., TwoViews] = TwoViews,
    images: int = 8,
    pairs: int = 4,
    seed: int = 0,
    run_dir: Folder = "run",
) -> Path:
    """Write ``views.png`` and return its path. Each row shows an image and pairs of its augmented views.

    Args:
        data: images, or a function that loads them.
        augment: builds the views, as for :func:`pretrain`.
        images: number of images, >= 1.
        pairs: number of pairs of views per image, >= 1.
        seed: seed of the views.
        run_dir: folder for the file; created if missing.

    Raises:
        UserError: if ``images`` or ``pairs`` is below 1.

    Example:
        >>> from twoview.data import digits
        >>> preview(digits, images=2, pairs=1, run_dir=folder).name
        'views.png'
    """
    for knob, value in (("images", images), ("pairs", pairs)):
        require(value >= 1, f"{knob}={value}: must be at least 1")
    loaded = data() if callable(data) else data
    views = augment(**loaded.view_limits())
    rows = torch.linspace(0, len(loaded.pretrain) - 1, min(images, len(loaded.pretrain))).long()
    path, grid = Path(run_dir) / "views.png", figures.views_grid(loaded.pretrain[rows], views, pairs, seed)
    write_atomically(path, lambda file: grid.save(file, "PNG"))
    log.info("originals on the left, then %d pairs of views: %s", pairs, path)
    return path


def _open(source: Source, data: Images, seed: int) -> tuple[Encoder, ImageData]:
    """Load the encoder and the images, and check that they fit each other."""
    if isinstance(data, ImageData) and str(source).startswith(("timm:", "random:")):
        source = load(str(source), data.image_size, data.channels, seed=seed)
    encoder = source if isinstance(source, Encoder) else load(source, seed=seed)
    card = encoder.card
    if not isinstance(data, ImageData):
        sizes = {"image_size": card.image_size, "channels": card.channels}
        accepted = inspect.signature(data).parameters.values()
        if card.store_size and any(p.name == "store_size" or p.kind is p.VAR_KEYWORD for p in accepted):
            sizes["store_size"] = card.store_size
        data = data(**sizes)
    found, needed = data.channels, card.channels
    require(found == needed, f"data: {data.name} has {found} channels, the checkpoint needs {needed}")
    # Cards of published and random weights lack sizes, and some of them mean and std.
    given: dict[str, Any] = {} if card.resize_size else {"store_size": data.store_size, "resize_size": data.resize_size}
    mean, std = (card.mean, card.std) if card.mean else map(tuple, data.mean_std)
    return encoder.with_card(**given, mean=mean, std=std), data


def _begin(task: str, encoder: Encoder, images: ImageData, seed: int, run_dir: Path) -> Report:
    card = encoder.card
    report = record.begin(task, card.method, card.backbone, images.name, seed, run_dir)
    return report | ({"checkpoint": encoder.source} if encoder.source else {})


def _views(augment: Callable[..., TwoViews], encoder: Encoder, images: ImageData) -> TwoViews:
    return augment(**images.view_limits(encoder.card.mean, encoder.card.std))


def _evaluate(
    report: Report, encoder: Encoder, images: ImageData, views: TwoViews, settings: EvaluationSettings
) -> Report:
    return evaluation.evaluate_and_write(report | _test(images), encoder, images, views, settings)


def _test(images: ImageData) -> Report:
    return {"classes": images.classes, "test_fingerprint": images.test_fingerprint}
