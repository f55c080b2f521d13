"""Fine-tuning: the whole network trained on some labels, beside the same network from random initialisation."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twoview import records
from twoview.augment import TwoViews, mixed
from twoview.backbones import at_random
from twoview.data import ImageData, Images, Preprocess
from twoview.errors import UserError
from twoview.evaluate import Protocol, extract, few_label_splits, score, split_holdout
from twoview.evaluate.probes import Prediction
from twoview.evaluate.sgd import shuffled
from twoview.judging import fingerprint, subject, view_limits
from twoview.optim import Optimization
from twoview.pretrain import choose_precision
from twoview.records import pick_device
from twoview.report import keep_predictions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FineTuning:
    """How a network is fine-tuned.

    Args:
        label_share: share of the training labels that is used, in (0, 1]; the same images for every run.
        epochs: passes over them, at least 1.
        least_steps: more epochs where few labels would make fewer steps than this, without which a network from random
            initialisation has no chance.
        batch_size: images a step, at least 2.
        learning_rates: those that are tried on the held-out part.
        holdout: share of the used labels that the learning rate is chosen on, in (0, 1).
        supervised: train the same network from random initialisation too, by the same rules.

    Raises:
        UserError: a value out of range.
    """

    label_share: float = 1.0
    epochs: int = 30
    least_steps: int = 300
    batch_size: int = 128
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3)
    holdout: float = 0.2
    supervised: bool = True

    def __post_init__(self) -> None:
        for knob, high in (("label_share", 1.0), ("holdout", 0.99)):
            if not 0 < getattr(self, knob) <= high:
                raise UserError(f"finetune.{knob}={getattr(self, knob)}: give a share above 0, up to {high:g}")
        for knob, least in (("epochs", 1), ("least_steps", 0), ("batch_size", 2)):
            if getattr(self, knob) < least:
                raise UserError(f"finetune.{knob}={getattr(self, knob)}: must be at least {least}")
        if not self.learning_rates or not all(lr > 0 for lr in self.learning_rates):
            raise UserError(f"finetune.learning_rates={list(self.learning_rates)}: give one or more numbers above 0")


def finetune(
    checkpoint: str | Path,
    data: ImageData | Callable[..., ImageData],
    augment: Callable[..., TwoViews],
    optimization: Optimization,
    schedule: Callable[[float, float], float],
    tuning: FineTuning | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    run_dir: str | Path = "run",
) -> dict[str, Any]:
    """Train the whole network on some labels, from the checkpoint and, for reference, from random initialisation.

    Args:
        checkpoint: run folder, file, "timm:NAME" or "random:NAME".
        data: the images, or what loads them; it is called with ``image_size`` and ``channels`` of the checkpoint.
        augment: makes the views, of which the first is taken.
        optimization: the optimiser to be; its learning rate is chosen among those of ``tuning``.
        schedule: ``(epoch, epochs) -> factor`` of the learning rate.
        tuning: how long, on which share of the labels.
        weights: local file of weights for "timm:NAME".
        seed: of classifier, order, draws and held-out split; which labels are used is the same for all seeds.
        run_dir: folder for ``report.json``; made if missing.

    Returns:
        The report, as written to ``report.json``.

    Raises:
        UserError: no checkpoint there, or images that do not fit it.
    """
    tuning, run_dir = tuning or FineTuning(), Path(run_dir)
    backbone, preprocess, card, images = subject(checkpoint, data, weights, seed)
    assert images.train is not None
    assert images.test is not None
    report = records.begin("finetune", card, seed, run_dir) | {"checkpoint": card["path"]}
    positions = torch.arange(len(images.train))
    if tuning.label_share < 1:
        only = Protocol(label_shares=[tuning.label_share], labels_per_class=[1])
        positions = list(few_label_splits(images.train.labels, only).values())[-1][0]
    views = augment(**view_limits(card), mirror=images.mirror, least_crop=images.least_crop)
    networks = {"fine-tuned": backbone}
    if tuning.supervised:
        networks["supervised"] = at_random(card["backbone"], seed)
    classes, protocol, results, predicted = len(images.classes), Protocol(), {}, {}
    for name, network in networks.items():
        log.info("%s on %d labels", name, len(positions))
        prediction = train_and_predict(
            network,
            images.train,
            positions,
            images.test,
            views,
            preprocess,
            tuning,
            optimization,
            schedule,
            classes,
            seed,
            pick_device(),
        )
        results[name] = {"finetune": score(prediction, images.test.labels, classes, protocol, seed)}
        predicted["finetune" if network is backbone else name] = prediction.classes
    keep_predictions(images.test.labels, predicted, run_dir)
    return records.write(
        report
        | {
            "classes": images.classes,
            "test_fingerprint": fingerprint(images.test),
            "results": results,
            "protocol": {
                **asdict(tuning),
                "labels": len(positions),
                "train_images": len(images.train),
                "test_images": len(images.test),
            },
            "figures": {"val/finetune_top1": results["fine-tuned"]["finetune"]["val_top1"]},
        },
        run_dir,
    )


def train_and_predict(
    backbone: nn.Module,
    images: Images,
    positions: Tensor,
    test: Images,
    views: TwoViews,
    preprocess: Preprocess,
    tuning: FineTuning,
    optimization: Optimization,
    schedule: Callable[[float, float], float],
    classes: int,
    seed: int,
    device: torch.device,
) -> Prediction:
    """Train a copy of the whole network and a linear classifier on some labels, and classify the test images.

    The learning rate is chosen on a held-out part of these labels, then the network is trained on all of them; the last
    epoch is tested.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``, left as it is.
        images: labelled training images.
        positions: int64, those whose labels are used.
        test: test images, whose labels are not read.
        views: augmentation, of which the first view is taken.
        preprocess: of test and held-out images.
        tuning: how long, on what.
        optimization: the optimiser to be; its learning rate is replaced.
        schedule: ``(epoch, epochs) -> factor`` of the learning rate.
        classes: number of classes.
        seed: of the classifier, order, draws and held-out split.
        device: where to compute.
    """
    fit, held = (
        positions[part] for part in split_holdout(images.labels[positions], tuning.holdout, seed, "finetune.holdout")
    )
    bf16 = choose_precision("auto", backbone, device) == "bf16-mixed"

    def trained(used: Tensor, lr: float) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(mixed((seed, 1)))
            width = int(extract(backbone, images.subset(used[:1]), preprocess, device).shape[1])
            network = nn.Sequential(copy.deepcopy(backbone), nn.Linear(width, classes)).to(device)
            network.to(memory_format=torch.channels_last).train()
            optimizer = replace(optimization, lr=lr).build(network, tuning.batch_size)
            a_pass = max(1, len(used) // tuning.batch_size)
            epochs = max(tuning.epochs, math.ceil(tuning.least_steps / a_pass))
            for batch, progress, key in shuffled(images, used, tuning.batch_size, epochs, seed):
                view = views(batch.pixels.to(device), key)[0].to(memory_format=torch.channels_last)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = F.cross_entropy(network(view).float(), batch.labels.to(device))
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * schedule(progress * epochs, epochs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return network

    views.to(device)
    accuracies = []
    for lr in tuning.learning_rates:
        predicted = extract(trained(fit, lr), images.subset(held), preprocess, device).argmax(1)
        accuracies.append(float((predicted == images.labels[held]).double().mean()))
        log.info("learning rate %g: %.1f %% on held-out labels", lr, 100 * accuracies[-1])
    best = int(np.argmax(accuracies))
    scores = extract(trained(positions, tuning.learning_rates[best]), test, preprocess, device)
    chosen = {"val_top1": accuracies[best], "lr": tuning.learning_rates[best]}
    return Prediction(scores.argmax(1), chosen, scores.softmax(1))
