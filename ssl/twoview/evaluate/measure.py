"""All that is measured of a network's features, beside random initialisation and raw pixels."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twoview.augment import TwoViews
from twoview.backbones import at_random
from twoview.data import ImageData, Images, Preprocess
from twoview.errors import UserError
from twoview.evaluate.cache import kept, key
from twoview.evaluate.features import extract
from twoview.evaluate.invariance import NOTHING, augmented, invariance
from twoview.evaluate.overlap import Shared, Thumbnails, shared_images, thumbnails
from twoview.evaluate.probes import Labelled, Prediction, few_label_splits, few_labels, predict, score, score_few_labels
from twoview.evaluate.protocol import PROBES, Protocol
from twoview.evaluate.sgd import linear_sgd
from twoview.evaluate.structure import clustering, geometry, retrieval, sample

log = logging.getLogger(__name__)


@dataclass
class Evidence:
    """What figures were made of, for files and pictures: everything is of the trained network."""

    train: Tensor  # fp32 [N, F] features
    test: Tensor  # fp32 [T, F]
    predictions: dict[str, Prediction]
    splits: dict[str, list[Tensor]] = field(default_factory=dict)  # positions of few labels
    shared: dict[str, list[Shared]] = field(default_factory=dict)  # with "train", and "pretrain" if that is another


def measure(
    backbone: nn.Module,
    preprocess: Preprocess,
    build: Mapping[str, Any],
    limits: Mapping[str, Any],
    images: ImageData,
    protocol: Protocol,
    seed: int,
    device: torch.device,
    views: TwoViews,
) -> tuple[dict[str, Any], Evidence]:
    """Measure what the protocol asks for; test labels are read once, after every choice.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``, left as it is.
        preprocess: of its images.
        build: arguments of :func:`twoview.backbones.create_backbone` for the network at random initialisation.
        limits: what :class:`twoview.augment.TwoViews` must know: image_size, channels, mean, std.
        images: with labelled training and test images.
        protocol: what is measured, and how.
        seed: of every draw.
        device: where to compute.
        views: of which alignment is measured.

    Returns:
        ``results``: for "trained" and each baseline what each part gives; ``protocol``; ``integrity``; ``figures``,
        which a sweep may select by; and the evidence.

    Raises:
        UserError: features that are not finite.
    """
    train, test = images.train, images.test
    assert train is not None
    assert test is not None
    parts, classes = protocol.parts, len(images.classes)
    baselines: dict[str, nn.Module | None] = {}
    if protocol.baselines:
        baselines = {"random initialisation": at_random(build, seed), "raw pixels": None}
    small: dict[str, Thumbnails] = {}
    if protocol.baselines or "integrity" in parts:
        small = {"train": thumbnails(train), "test": thumbnails(test)}
    few = few_label_splits(train.labels, protocol) if "few_labels" in parts else {}
    some = test.subset(sample(len(test), protocol.shift_images))

    def judged(name: str, network: nn.Module | None) -> tuple[dict[str, Any], Evidence]:
        log.info("evaluation: %s", name)
        ours, theirs = (
            small[name].pixels.flatten(1).float() / 255
            if network is None
            else _features(network, split, preprocess, device, images.batch_size, protocol.cache)
            for name, split in (("train", train), ("test", test))
        )
        probes = [part for part in PROBES if part in parts and part != "linear_sgd"]
        learned = Labelled(ours, train.labels)
        predictions = predict(learned, theirs, protocol, seed, probes, classes)
        if "linear_sgd" in parts and network is not None:
            recipe = {**NOTHING, "crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3), "flip": 0.5}
            crops = TwoViews(**limits, **recipe, mirror=images.mirror, least_crop=images.least_crop)
            predictions["linear_sgd"] = linear_sgd(
                network, train, (ours, theirs), crops, protocol, classes, seed, device
            )
        guesses = few_labels(learned, theirs, few, protocol, classes) if few else {}
        # From here on the labels of test images are read; nothing is chosen any more.
        found: dict[str, Any] = {
            probe: score(prediction, test.labels, classes, protocol, seed) for probe, prediction in predictions.items()
        }
        if "few_labels" in parts:
            found["few_labels"] = score_few_labels(guesses, test.labels)
        if "retrieval" in parts:
            gallery = learned if protocol.retrieval == "gallery" else None
            found["retrieval"] = retrieval(theirs, test.labels, gallery, protocol.ranks)
        if "clustering" in parts:
            found["clustering"] = clustering(theirs, test.labels, classes, seed)
        if "geometry" in parts:
            pairs = augmented(network, some, views, device, images.batch_size, seed) if network is not None else None
            found["geometry"] = geometry(ours, pairs)
        if "invariance" in parts and network is not None:
            probe = next((p for p in predictions.values() if p.classify is not None), None)
            found["invariance"] = invariance(
                network, some, limits, device, images.batch_size, seed, probe and probe.classify
            )
        return found, Evidence(ours, theirs, predictions, few)

    trained, evidence = judged("trained", backbone)
    results = {"trained": trained}
    for name, network in baselines.items():
        make = partial(lambda *source: judged(*source)[0], name, network)
        others = (asdict(protocol), classes, seed, str(device), images.batch_size, images.mirror, images.least_crop)
        results[name] = kept(protocol.cache, partial(key, name, network, preprocess, train, test, views, *others), make)
    report = {
        "results": results,
        "protocol": {**asdict(protocol), "train_images": len(train), "test_images": len(test)},
        "figures": {f"val/{probe}_top1": p.chosen["val_top1"] for probe, p in evidence.predictions.items()},
    }
    if "integrity" in parts:
        features = (evidence.train, evidence.test)
        evidence.shared["train"] = shared_images(small["train"], small["test"], features)
        if images.pretrain is not train:
            evidence.shared["pretrain"] = shared_images(thumbnails(images.pretrain), small["test"])
        report["integrity"] = _integrity(evidence, test.labels)
    return report, evidence


def _features(
    network: nn.Module, images: Images, preprocess: Preprocess, device: torch.device, batch_size: int, cache: str | None
) -> Tensor:
    make = partial(extract, network, images, preprocess, device, batch_size)
    features = kept(cache, partial(key, network, preprocess, images), make)
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise UserError(
            f"checkpoint: {bad} of {len(features)} images get features that are not finite: training has diverged; "
            "take an earlier checkpoint"
        )
    return features


def _integrity(evidence: Evidence, labels: Tensor) -> dict[str, Any]:
    """Counts of shared images, and the accuracies of the trained network on the others."""
    clean = torch.ones(len(labels), dtype=torch.bool)
    for pairs in evidence.shared.values():
        clean[[pair.test for pair in pairs]] = False
    counts = {
        split: {"exact": sum(pair.exact for pair in pairs), "near": sum(not pair.exact for pair in pairs)}
        for split, pairs in evidence.shared.items()
    }
    without = {
        probe: float((p.classes == labels)[clean].double().mean()) if clean.any() else None
        for probe, p in evidence.predictions.items()
    }
    return {"shared": counts, "test_images_left": int(clean.sum()), "top1_without_shared": without}
