"""Fine-tuning of the whole network on labels, with the same network from random initialization as the baseline."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twoview.augment import TwoViews, derive_seed
from twoview.data import ImageData, split_holdout
from twoview.devices import explained_memory
from twoview.encoder import Encoder
from twoview.errors import require, require_at_least, require_positive
from twoview.evaluation.evaluate import seen_labels, split_seed
from twoview.evaluation.few_labels import FewLabels, few_label_splits
from twoview.evaluation.linear_sgd import shuffled
from twoview.evaluation.probe import Prediction, score
from twoview.evaluation.settings import EvaluationSettings
from twoview.optim import OptimizerSettings
from twoview.schedules import require_warmup_fits
from twoview.training.trainer import choose_precision

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FineTuning:
    """Settings of fine-tuning.

    Args:
        label_share: share of the training labels that is used, in (0, 1]; the same images for every run.
        epochs: number of epochs over these images, at least 1.
        least_steps: smallest number of training steps, at least 0. The number of epochs is increased to reach it, since
            a network trained from random initialization needs a minimum number of steps.
        batch_size: number of images per step, at least 2.
        learning_rates: learning rates to choose from, > 0.
        holdout: share of the used labels on which the learning rate is chosen, in (0, 0.99].
        supervised: also train the same network from random initialization in the same way.

    Raises:
        UserError: if a value is out of range.
    """

    label_share: float = 1.0
    epochs: int = 30
    least_steps: int = 300
    batch_size: int = 128
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3)
    holdout: float = 0.2
    supervised: bool = True

    def __post_init__(self) -> None:
        for knob, value, high in (("label_share", self.label_share, 1.0), ("holdout", self.holdout, 0.99)):
            require(0 < value <= high, f"finetune.{knob}={value}: give a share above 0, up to {high:g}")
        require_at_least("finetune", 1, epochs=self.epochs)
        require_at_least("finetune", 2, batch_size=self.batch_size)
        require_at_least("finetune", 0, least_steps=self.least_steps)
        require_positive("finetune", learning_rates=self.learning_rates)


@dataclass(frozen=True)
class Supervised:
    """Data and settings for training networks on labels.

    Args:
        images: labeled training and test images; test labels are not read here.
        views: augmentation; only the first view is used.
        optimizer: optimizer settings; the learning rate is replaced by one of ``settings.learning_rates``.
        schedule: function ``(epoch, epochs) -> factor``, by which the learning rate is multiplied.
        settings: settings of fine-tuning.
        seed: seed of the classifier, the order of the images, the views and the held-out split.
        device: device of the computation.
    """

    images: ImageData
    views: TwoViews
    optimizer: OptimizerSettings
    schedule: Callable[[float, float], float]
    settings: FineTuning
    seed: int
    device: torch.device


@explained_memory("fine-tuning: out of memory; try a smaller finetune.batch_size")
def finetune(encoder: Encoder, how: Supervised) -> tuple[dict[str, Any], dict[str, Prediction]]:
    """Fine-tune a network, and for reference train the same network from random initialization.

    Args:
        encoder: the network; it is not changed.
        how: data and settings.

    Returns:
        ``results``, ``protocol`` and ``figures`` of the report; and the predictions for the test images by name of the
        network, "finetune" or "supervised".

    Raises:
        UserError: if the images have no labels, or too few labels to hold any out.
    """
    (train, test), settings, classes = how.images.labelled, how.settings, len(how.images.classes)
    positions = torch.arange(len(train))
    if settings.label_share < 1:
        only = FewLabels(label_shares=[settings.label_share], labels_per_class=[1])
        positions = list(few_label_splits(train.labels, only).values())[-1][0]
    networks = {"fine-tuned": encoder}
    if settings.supervised:
        networks["supervised"] = encoder.at_random(how.seed)
    predictions = {}
    for name, network in networks.items():
        log.info("%s on %d labels", name, len(positions))
        predictions[name] = train_and_predict(network, positions, how)
    # From here on, test labels are read.
    resamples = EvaluationSettings().bootstrap
    results = {
        name: {"finetune": score(prediction, test.labels, classes, resamples, how.seed)}
        for name, prediction in predictions.items()
    }
    sizes = {"labels": len(positions), "train_images": len(train), "test_images": len(test)}
    figures = {"val/finetune_top1": results["fine-tuned"]["finetune"]["val_top1"]}
    report: dict[str, Any] = {"results": results, "protocol": {**asdict(settings), **sizes}, "figures": figures}
    report |= seen_labels(encoder.card, train.labels[positions], settings.holdout)
    return report, {"finetune": predictions.pop("fine-tuned"), **predictions}


def train_and_predict(encoder: Encoder, positions: Tensor, how: Supervised) -> Prediction:
    """Train a copy of a network with a linear classifier, and classify the test images.

    The learning rate is chosen on a held-out part of the labels. Then the network is trained on all labels, and the
    network of the last epoch classifies the test images.

    Args:
        encoder: the network; it is not changed.
        positions: int64 ``[M]``, positions of the training images whose labels are used.
        how: data and settings.

    Returns:
        The predictions, with the chosen learning rate and its accuracy on held-out labels.
    """
    (train, test), settings = how.images.labelled, how.settings
    seed = split_seed(encoder.card, how.seed)
    parts = split_holdout(train.labels[positions], settings.holdout, seed, "finetune.holdout")
    fitted, held_out = (positions[part] for part in parts)
    how.views.to(how.device)
    accuracies = []
    for lr in settings.learning_rates:
        scores = _train(encoder, fitted, lr, how).feature_matrix(train.subset(held_out))
        accuracies.append(float((scores.argmax(1) == train.labels[held_out]).double().mean()))
        log.info("learning rate %g: %.1f %% on held-out labels", lr, 100 * accuracies[-1])
    best = int(np.argmax(accuracies))
    scores = _train(encoder, positions, settings.learning_rates[best], how).feature_matrix(test)
    chosen = {"val_top1": accuracies[best], "lr": settings.learning_rates[best]}
    return Prediction(scores.argmax(1), chosen, scores.softmax(1))


def _train(encoder: Encoder, positions: Tensor, lr: float, how: Supervised) -> Encoder:
    """Return a trained encoder whose features are class scores."""
    (train, _), settings, device = how.images.labelled, how.settings, how.device
    bf16 = choose_precision("auto", encoder.network, device) == "bf16-mixed"
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed((how.seed, 1)))
        # This call draws from torch's generator. With encoder.width, the classifier would be initialized otherwise.
        width = encoder.feature_matrix(train.subset(positions[:1])).shape[1]
        network = nn.Sequential(copy.deepcopy(encoder.network), nn.Linear(width, len(how.images.classes)))
        network.to(device).to(memory_format=torch.channels_last).train()
        optimizer = replace(how.optimizer, lr=lr).build(network, settings.batch_size)
        steps_per_epoch = max(1, len(positions) // settings.batch_size)
        epochs = max(settings.epochs, math.ceil(settings.least_steps / steps_per_epoch))
        require_warmup_fits(how.schedule, {f"{epochs} epochs of fine-tuning": epochs})
        for batch, progress, key in shuffled(train, positions, settings.batch_size, epochs, how.seed):
            view = how.views(batch.pixels.to(device), key, batch.sizes)[0].to(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = nn.functional.cross_entropy(network(view).float(), batch.labels.to(device))
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * how.schedule(progress * epochs, epochs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Encoder(network, encoder.card).to(device)
