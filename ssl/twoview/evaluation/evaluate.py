"""Evaluation of a network and its baselines: features, choices without test labels, then scores with test labels."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twoview.augment import TwoViews
from twoview.data import ImageData
from twoview.devices import explained_memory
from twoview.encoder import Encoder, ModelCard, hidden_labels
from twoview.evaluation.cache import cached, key
from twoview.evaluation.feature_store import network_features, pixel_features
from twoview.evaluation.integrity import SIDE, Shared, thumbnails
from twoview.evaluation.measure import Inputs, Labelled, Measure
from twoview.evaluation.probe import Prediction, score
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


@explained_memory(
    "evaluation: out of memory; try a smaller data.batch_size, or fewer eval.parts; no checkpoint is lost"
)
def evaluate(
    encoder: Encoder, images: ImageData, views: TwoViews, settings: EvaluationSettings, seed: int
) -> tuple[dict[str, Any], Evidence]:
    """Evaluate a network and its baselines by all measures.

    Args:
        encoder: the network, on the device of the computation.
        images: labeled training and test images.
        views: augmentation for which alignment is measured.
        settings: measures, and how choices are made.
        seed: seed of all random draws.

    Returns:
        A part of the report, and the evidence. The part of the report has these keys:

        * ``results``: metrics of each measure, for "trained" and for each baseline;
        * ``protocol``: all settings, and the numbers of training and test images;
        * ``figures``: accuracies on held-out training labels, which a sweep can select by;
        * ``integrity``: metrics of :class:`twoview.evaluation.integrity.Integrity`, if this measure is taken.

    Raises:
        UserError: if the images have no labels, or features are not finite.
    """
    train, test = images.labelled
    small = {}
    if settings.baselines or any(measure.uses_thumbnails for measure in settings.measures):
        side = min(SIDE, max(train.size, test.size))
        small = {"train": thumbnails(train, side), "test": thumbnails(test, side)}

    stored = (settings.memory, settings.cache)

    def inputs(name: str, network: Encoder | None) -> Inputs:
        log.info("evaluation: %s", name)
        ours, theirs = (
            pixel_features(small[split].pixels, *stored)
            if network is None
            else network_features(network.to(encoder.device), source, images.batch_size, *stored)
            for split, source in (("train", train), ("test", test))
        )
        return Inputs(
            name=name,
            encoder=network,
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
        )

    def baseline(name: str, network: Encoder | None) -> dict[str, Any]:
        return take(settings.measures, inputs(name, network), test.labels)[0]

    trained = inputs("trained", encoder)
    found, chosen = take(settings.measures, trained, test.labels)
    integrity = found.pop("integrity", None)
    results = {"trained": found}
    networks = {"random initialization": encoder.at_random(seed), "raw pixels": None} if settings.baselines else {}
    for name, network in networks.items():
        parts = (network and network.network, encoder.preprocess, train, test, views, settings, len(images.classes))
        others = (seed, str(encoder.device), images.batch_size, images.allow_flip, images.min_crop_area)
        of = partial(key, name, *parts, *others, split_seed(encoder.card, seed))
        fits = partial(_is_result, settings.measures)
        results[name] = cached(settings.cache, of, partial(baseline, name, network), fits)
    predictions = {name: p for name, p in chosen.items() if isinstance(p, Prediction)}
    report = {
        "results": results,
        "protocol": {**settings.knobs(), "train_images": len(train), "test_images": len(test)},
        "figures": {f"val/{probe}_top1": p.chosen.get("val_top1") for probe, p in predictions.items()},
        **({} if integrity is None else {"integrity": integrity}),
    }
    report |= seen_labels(encoder.card, train.labels, settings.holdout)
    splits = getattr(chosen.get("few_labels"), "splits", {})
    shared = getattr(chosen.get("integrity"), "shared", {})
    return report, Evidence(trained.train.features, trained.test, predictions, splits, shared)


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


def take(measures: Sequence[Measure], inputs: Inputs, labels: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take measures in two phases: all choices, then all scores.

    Args:
        measures: measures to take; a measure that does not apply to ``inputs`` is left out.
        inputs: features and images, without test labels.
        labels: int64 ``[T]``, labels of the test images.

    Returns:
        Metrics by name of the measure, and results of ``choose`` by name of the measure.
    """
    chosen: dict[str, Any] = {}
    for measure in measures:
        if measure.applies(inputs):
            chosen[measure.name] = measure.choose(inputs, chosen)
    # From here on, test labels are read and nothing is chosen.
    found = {}
    for measure in (measure for measure in measures if measure.name in chosen):
        result = chosen[measure.name]
        if isinstance(result, Prediction):
            found[measure.name] = score(result, labels, inputs.classes, inputs.bootstrap, inputs.seed)
        else:
            found[measure.name] = measure.score(result, inputs, labels)
    return found, chosen


def _is_result(measures: Sequence[Measure], found: Any) -> bool:
    names = {measure.name for measure in measures}
    return isinstance(found, dict) and found.keys() <= names and all(isinstance(row, dict) for row in found.values())
