"""Evaluation of a network and its baselines: features, choices without test labels, then scores with test labels."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twoview.augment import TwoViews
from twoview.data import ImageData
from twoview.devices import explained_memory, memory_error
from twoview.encoder import Encoder, ModelCard, hidden_labels
from twoview.evaluation import progress
from twoview.evaluation.cache import cached, key
from twoview.evaluation.expectation import announce
from twoview.evaluation.feature_store import network_features, pixel_features
from twoview.evaluation.integrity import SIDE, Shared, thumbnails
from twoview.evaluation.measure import Inputs, Labelled, Measure, Thumbnails
from twoview.evaluation.phases import INTERRUPTED, OUT_OF_MEMORY, Taken, take
from twoview.evaluation.probe import Prediction
from twoview.evaluation.projection import DIRECTIONS, Projection, fit_projection, projects
from twoview.evaluation.settings import EvaluationSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evidence:
    """Features and predictions of the trained network, from which the files and plots of a report are made.

    Attributes:
        train: fp32 ``[N, F]`` features of the training images.
        test: fp32 ``[T, F]`` features of the test images.
        predictions: predictions of each probe, by name of the probe.
        splits: int64 positions of the labeled training images of each draw, by size of the draw; see
            :func:`twoview.evaluation.few_labels.few_label_splits`.
        shared: test images that are also training images, by split ("train" or "pretrain").
    """

    train: Tensor
    test: Tensor
    predictions: Mapping[str, Prediction]
    splits: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    shared: Mapping[str, Sequence[Shared]] = field(default_factory=dict)


class _Incomplete(Exception):  # noqa: N818 (not an error)
    """Carries a result that must not be stored in the cache."""

    def __init__(self, taken: Taken) -> None:
        super().__init__()
        self.taken = taken


@explained_memory(
    "evaluation: out of memory; try a smaller data.batch_size, or fewer eval.parts; no checkpoint is lost"
)
def evaluate(
    encoder: Encoder, images: ImageData, views: TwoViews, settings: EvaluationSettings, seed: int
) -> tuple[dict[str, Any], Evidence]:
    """Evaluate a network and its baselines by all measures.

    A measure that runs out of memory is left out, and the other measures are taken. After Ctrl-C, what is finished is
    returned, if the features of the trained network are.

    Args:
        encoder: the network, on the device of the computation.
        images: labeled training and test images.
        views: augmentation for which alignment is measured.
        settings: measures, and how choices are made.
        seed: seed of all random draws.

    Returns:
        A part of the report, and the evidence. The part of the report has these keys:

        * ``results``: metrics of each measure, for "trained" and for each baseline;
        * ``protocol``: all settings, the numbers of training and test images, and ``pixel_directions``, the number of
          features to which raw pixels are projected if they are more;
        * ``figures``: accuracies on held-out training labels, which a sweep can select by;
        * ``integrity``: metrics of :class:`twoview.evaluation.integrity.Integrity`, if this measure is taken;
        * ``missing``: reasons why parts have no results, by network and name of the part, if there are such parts;
        * ``incomplete``: True after Ctrl-C, otherwise missing.

    Raises:
        UserError: if the images have no labels, or features are not finite.
        KeyboardInterrupt: at Ctrl-C before the features of the trained network are computed, and at a second Ctrl-C.
    """
    train, test = images.labelled
    side = min(SIDE, max(train.size, test.size))
    announce(encoder, images, settings, side)
    small = {}
    if settings.baselines or any(measure.uses_thumbnails for measure in settings.measures):
        with progress.part("center squares of all images"):
            small = {"train": thumbnails(train, side), "test": thumbnails(test, side)}
    inputs = partial(_inputs, encoder, images, views, settings, seed, small)

    def baseline(name: str, network: Encoder | None) -> dict[str, Any]:
        given = inputs(name, network)
        taken = take(settings.measures, given, test.labels)
        if given.projection is not None:
            taken.found["projection"] = given.projection.facts()
        if taken.missing or taken.stopped:
            raise _Incomplete(taken)
        return taken.found

    trained = inputs("trained", encoder)
    taken = take(settings.measures, trained, test.labels)
    integrity = taken.found.pop("integrity", None)
    results, missing, stopped = {"trained": taken.found}, {"trained": taken.missing}, taken.stopped
    networks = {"random initialization": encoder.at_random(seed), "raw pixels": None} if settings.baselines else {}
    for name, network in networks.items():
        if stopped:
            missing[name] = {"all": INTERRUPTED}
            continue
        parts = (network and network.network, encoder.preprocess, train, test, views, settings, len(images.classes))
        others = (seed, str(encoder.device), images.batch_size, images.allow_flip, images.min_crop_area)
        of = partial(key, name, *parts, *others, split_seed(encoder.card, seed))
        fits = partial(_is_result, settings.measures)
        found, missing[name], stopped = _finished(
            partial(cached, settings.cache, of, partial(baseline, name, network), fits)
        )
        if found:
            results[name] = found
    predictions = {name: p for name, p in taken.chosen.items() if isinstance(p, Prediction)}
    sizes = {"train_images": len(train), "test_images": len(test), "pixel_directions": DIRECTIONS}
    report = {
        "results": results,
        "protocol": {**settings.knobs(), **sizes},
        "figures": {f"val/{probe}_top1": p.chosen.get("val_top1") for probe, p in predictions.items()},
        **({} if integrity is None else {"integrity": integrity}),
        **({"missing": {name: row for name, row in missing.items() if row}} if any(missing.values()) else {}),
        **({"incomplete": True} if stopped else {}),
    }
    report |= seen_labels(encoder.card, train.labels, settings.holdout)
    splits = getattr(taken.chosen.get("few_labels"), "splits", {})
    shared = getattr(taken.chosen.get("integrity"), "shared", {})
    return report, Evidence(trained.train.features, trained.test, predictions, splits, shared)


def _inputs(
    encoder: Encoder,
    images: ImageData,
    views: TwoViews,
    settings: EvaluationSettings,
    seed: int,
    small: Mapping[str, Thumbnails],
    name: str,
    network: Encoder | None,
) -> Inputs:
    """Compute the features of a network, or of raw pixels if it is None, and collect what measures use."""
    log.info("evaluation: %s", name)
    train, test = images.labelled
    with progress.part(f"{name}: features"):
        projection = _projection(small["train"].pixels, encoder.device) if network is None else None
        basis = projection and projection.basis
        ours, theirs = (
            pixel_features(small[split].pixels, settings.memory, settings.cache, basis)
            if network is None
            else network_features(
                network.to(encoder.device), source, images.batch_size, settings.memory, settings.cache
            )
            for split, source in (("train", train), ("test", test))
        )
    return Inputs(
        name=name,
        encoder=network and network.folded(),
        train=Labelled(ours, train.labels),
        test=theirs,
        train_images=train,
        test_images=test.with_labels(torch.full_like(test.labels, -1)),
        pretrain_images=None if images.pretrain is train else images.pretrain,
        views=views,
        thumbnails=small,
        classes=len(images.classes),
        holdout=settings.holdout,
        bootstrap=settings.bootstrap,
        seed=seed,
        split_seed=split_seed(encoder.card, seed),
        device=encoder.device,
        batch_size=images.batch_size,
        projection=projection,
    )


def _projection(pixels: Tensor, device: torch.device) -> Projection | None:
    return fit_projection(pixels, device) if projects(len(pixels), pixels[0].numel()) else None


def _finished(compute: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str], bool]:
    """Return the metrics of a baseline, reasons for missing ones, and whether Ctrl-C was pressed."""
    try:
        return compute(), {}, False
    except _Incomplete as part:
        return part.taken.found, part.taken.missing, part.taken.stopped
    except KeyboardInterrupt:
        return {}, {"all": INTERRUPTED}, True
    except Exception as error:
        explained = memory_error(error, OUT_OF_MEMORY)
        if explained is None:
            raise
        log.warning("evaluation: a baseline: %s", explained)
        return {}, {"all": str(explained)}, False


def split_seed(card: ModelCard, seed: int) -> int:
    """Seed of the held-out split. Training with labels has hidden a split of its own seed, which is held out again.

    Args:
        card: facts about the network.
        seed: seed of the evaluation, for networks that were trained without labels.
    """
    return seed if card.hidden_labels is None else card.seed


def seen_labels(card: ModelCard, labels: Tensor, holdout: float) -> dict[str, list[str]]:
    """Entry "warnings" of a report if the held-out labels may have been used in training; empty otherwise.

    Args:
        card: facts about the network.
        labels: int64 ``[N]`` labels of the training images of the evaluation.
        holdout: share that the evaluation holds out.
    """
    if card.hidden_labels in (None, hidden_labels(labels, holdout)):
        return {}
    reason = "it was trained with labels of other images, or with another eval.holdout"
    message = f"choices of hyperparameters and val_top1 are not on labels that {card.method} has not seen: {reason}"
    log.warning("evaluation: %s", message)
    return {"warnings": [message]}


def _is_result(measures: Sequence[Measure], found: Any) -> bool:
    names = {"projection", *(measure.name for measure in measures)}
    return isinstance(found, dict) and found.keys() <= names and all(isinstance(row, dict) for row in found.values())
