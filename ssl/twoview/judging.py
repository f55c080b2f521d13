"""What a network is worth, from a checkpoint of twoview or from timm: evaluate, linear_probe, knn, finetune."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twoview import records
from twoview.augment import TwoViews
from twoview.backbones import build_arguments, create_backbone, published_input
from twoview.checkpoints import read_checkpoint, rebuild
from twoview.data import ImageData, Images, Preprocess
from twoview.errors import UserError
from twoview.evaluate import PARTS, Protocol, measure
from twoview.records import pick_device
from twoview.report import keep_evidence, write_pages

FULL = Protocol(parts=tuple(part for part in PARTS if part != "linear_sgd"))


def evaluate(
    checkpoint: str | Path,
    data: ImageData | Callable[..., ImageData],
    protocol: Protocol | None = None,
    augment: Callable[..., TwoViews] = TwoViews,
    weights: str | Path | None = None,
    seed: int = 0,
    run_dir: str | Path = "run",
) -> dict[str, Any]:
    """Everything that can be said of a backbone's features, beside random initialisation and raw pixels, on any images.

    Args:
        checkpoint: run folder, file, "timm:NAME" for a network with timm's published weights, or "random:NAME" for one
            at random initialisation.
        data: the images, or what loads them; it is called with ``image_size`` and ``channels`` of the checkpoint.
        protocol: what is measured, and how; None for all but ``linear_sgd``.
        augment: makes the views that alignment is measured between; the same for all that are to be compared.
        weights: local file of weights for "timm:NAME", instead of the published ones.
        seed: of the held-out split, of random initialisation and of every other draw.
        run_dir: folder for ``report.json``, ``report.md``, ``report.html`` and what they were made of; made if missing.

    Returns:
        The report, as written to ``report.json``.

    Raises:
        UserError: no checkpoint there, or images that do not fit it.
    """
    return _evaluate("evaluate", checkpoint, data, protocol or FULL, augment, weights, seed, run_dir)


def linear_probe(
    checkpoint: str | Path,
    data: ImageData | Callable[..., ImageData],
    protocol: Protocol | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    run_dir: str | Path = "run",
) -> dict[str, Any]:
    """Judge a backbone by linear probes alone, those of the protocol; arguments and results as :func:`evaluate`."""
    only = _only(protocol, "linear", "linear_without_bn", "linear_sgd")
    return _evaluate("linear_probe", checkpoint, data, only, TwoViews, weights, seed, run_dir)


def knn(
    checkpoint: str | Path,
    data: ImageData | Callable[..., ImageData],
    protocol: Protocol | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    run_dir: str | Path = "run",
) -> dict[str, Any]:
    """Judge a backbone by k nearest neighbours alone; arguments and results as :func:`evaluate`."""
    return _evaluate("knn", checkpoint, data, _only(protocol, "knn"), TwoViews, weights, seed, run_dir)


def _only(protocol: Protocol | None, *parts: str) -> Protocol:
    protocol = protocol or Protocol()
    return replace(protocol, parts=[part for part in protocol.parts if part in parts] or parts[:1])


def _evaluate(
    task: str,
    checkpoint: str | Path,
    data: ImageData | Callable[..., ImageData],
    protocol: Protocol,
    augment: Callable[..., TwoViews],
    weights: str | Path | None,
    seed: int,
    run_dir: str | Path,
) -> dict[str, Any]:
    backbone, preprocess, card, images = subject(checkpoint, data, weights, seed)
    report = records.begin(task, card, seed, Path(run_dir)) | {"checkpoint": card["path"]}
    views = augment(**view_limits(card), mirror=images.mirror, least_crop=images.least_crop)
    return judged(report, backbone, preprocess, card, images, protocol, views, seed, Path(run_dir), pick_device())


def judged(
    report: dict[str, Any],
    backbone: nn.Module,
    preprocess: Preprocess,
    card: Mapping[str, Any],
    images: ImageData,
    protocol: Protocol,
    views: TwoViews,
    seed: int,
    run_dir: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Measure, and write the report and what it was made of; pages too where all is evaluated.

    Args:
        report: what :func:`twoview.records.begin` and the caller know.
        backbone: the network.
        preprocess: of its images.
        card: what the checkpoint says of it.
        images: with labels.
        protocol: what is measured.
        views: that alignment is measured between.
        seed: of every draw.
        run_dir: where to.
        device: where to compute.

    Returns:
        The report, as written.
    """
    assert images.test is not None
    found, evidence = measure(
        backbone, preprocess, card["backbone"], view_limits(card), images, protocol, seed, device, views
    )
    report = report | {"classes": images.classes, "test_fingerprint": fingerprint(images.test)} | found
    keep_evidence(evidence, images, run_dir)
    report = records.write(report, run_dir)
    if report["task"] == "evaluate":
        write_pages(report, evidence, images, views, run_dir)
    return report


def subject(
    checkpoint: str | Path, data: ImageData | Callable[..., ImageData], weights: str | Path | None, seed: int
) -> tuple[nn.Module, Preprocess, dict[str, Any], ImageData]:
    """The network that is judged, its preprocessing and card, and images that fit it."""
    given = dict(getattr(data, "keywords", {}))  # what a partial function was told
    kind, _, name = str(checkpoint).partition(":")
    if weights is not None and kind != "timm":
        raise UserError(f"weights={weights}: goes with checkpoint=timm:NAME, not with checkpoint={checkpoint}")
    if name and kind in ("timm", "random"):
        size, mean, std = published_input(name) if kind == "timm" else (None, [], [])
        size = given.get("image_size") or size
        if size is None and callable(data):
            raise UserError(f"checkpoint={checkpoint}: give data.image_size=N, the pixels that it is built for")
        images = data(image_size=size, channels=given.get("channels") or 3) if callable(data) else data
        if kind == "random":
            mean, std = images.mean_std
        elif images.channels != len(mean):
            mean, std = ([sum(x) / len(x)] * images.channels for x in (mean, std))
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                published = kind == "timm" and weights is None
                backbone, _ = create_backbone(
                    name, images.channels, images.image_size, weights=weights, pretrained=published
                )
        except UserError as error:  # what is a knob of the backbone elsewhere
            told = str(error).replace("backbone.pretrained=true", f"checkpoint={checkpoint}")
            raise UserError(told.replace("backbone.weights", "weights")) from error
        card = {
            "method": f"{kind} {name}",  # another name than that of the baseline
            "backbone": build_arguments(backbone),
            "mean": mean,
            "std": std,
            "image_size": images.image_size,
            "channels": images.channels,
            "store_size": images.pretrain.size,
            "path": str(weights or checkpoint),
        }
        preprocess = Preprocess(images.image_size, mean, std, images.pretrain.size)
    else:
        content = read_checkpoint(checkpoint)
        backbone, preprocess = rebuild(content)
        card = content["twoview"] | {"path": content["path"]}
        stored = {knob: card[knob] for knob in ("image_size", "channels", "store_size")}
        for knob, value in stored.items():
            if given.get(knob) not in (None, value):
                raise UserError(
                    f"data.{knob}={given[knob]}: the checkpoint was made for {value}; leave data.{knob} out"
                )
        if "store_size" not in given:
            del stored["store_size"]
        images = data(**stored) if callable(data) else data
        if images.channels != card["channels"]:
            raise UserError(
                f"data: {images.name} has {images.channels} channels, the checkpoint wants {card['channels']}"
            )
    if images.train is None or images.test is None:
        raise UserError(f"data: {images.name} has no labels to fit and test a probe with; give labelled images")
    return backbone, preprocess, card | {"data": images.name}, images


def view_limits(card: Mapping[str, Any]) -> dict[str, Any]:
    """What the augmentation must know of the network that a card tells of."""
    return {knob: card[knob] for knob in ("image_size", "channels", "mean", "std")}


def fingerprint(images: Images) -> str:
    """Hash of images, by the statistics of each, and of their labels."""
    content = images.moments().numpy().tobytes() + images.labels.numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
