"""The papers' linear classification, which sees augmented images."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from twoview.augment import TwoViews, mixed
from twoview.data import Batch, Images
from twoview.evaluate.features import evaluating
from twoview.evaluate.probes import Prediction, linear_prediction, split_holdout
from twoview.evaluate.protocol import Protocol
from twoview.schedules import cosine_ramp


def linear_sgd(
    backbone: nn.Module,
    images: Images,
    features: tuple[Tensor, Tensor],
    views: TwoViews,
    protocol: Protocol,
    classes: int,
    seed: int,
    device: torch.device,
) -> Prediction:
    """The papers' linear classification: SGD on features of randomly cropped and mirrored images, the backbone fixed.

    MoCo (arXiv:1911.05722, section 4.1) and SimCLR (arXiv:2002.05709, appendix B.5): momentum 0.9, no weight decay, 100
    epochs; here with a cosine schedule. All learning rates are trained together, once without the held-out images,
    which choose among them, and once with all, which is tested.

    Args:
        backbone: ``[N, C, H, W] -> [N, F]``, left as it is.
        images: N labelled training images.
        features: ``[N, F]`` of these images without augmentation, and ``[T, F]`` of test images.
        views: random crop and flip alone, of which the first view is taken.
        protocol: gives learning rates, epochs, batch and the held-out share.
        classes: number of classes.
        seed: of order, draws and the held-out split.
        device: where to compute.
    """
    train, test = features
    fit, held = split_holdout(images.labels, protocol.holdout, seed)
    rates = torch.tensor(sorted(protocol.sgd_lr)) * protocol.sgd_batch_size / 256
    fitted = torch.zeros(len(images), dtype=torch.bool)
    fitted[fit] = True
    weights = torch.zeros(2 * len(rates), train.shape[1], classes, requires_grad=True)
    intercepts = torch.zeros(2 * len(rates), 1, classes, requires_grad=True)
    # Each head's learning rate multiplies its loss: with SGD the same thing, and one optimiser does for all.
    optimizer = torch.optim.SGD([weights, intercepts], lr=1.0, momentum=0.9)
    views.to(device)
    with evaluating(backbone, device) as features_of:
        every = torch.arange(len(images))
        for batch, progress, key in shuffled(images, every, protocol.sgd_batch_size, protocol.sgd_epochs, seed):
            x = features_of(views(batch.pixels.to(device), key)[0])
            scores = x @ weights + intercepts  # [2 R, B, C]
            each = F.cross_entropy(scores.flatten(0, 1), batch.labels.repeat(len(weights)), reduction="none")
            seen = torch.cat([fitted[batch.ids].expand(len(rates), -1), torch.ones(len(rates), len(x))])
            means = (each.view(len(weights), -1) * seen).sum(1) / seen.sum(1).clamp(min=1)
            optimizer.zero_grad()
            (rates.repeat(2) * means).sum().backward()
            optimizer.param_groups[0]["lr"] = cosine_ramp(progress, 1.0, 0.0)
            optimizer.step()
    with torch.no_grad():
        accuracies = ((train[held] @ weights + intercepts).argmax(2) == images.labels[held]).double().mean(1)
        best = int(accuracies[: len(rates)].argmax())
        chosen = {"val_top1": float(accuracies[best]), "lr": sorted(protocol.sgd_lr)[best]}
        probe = torch.cat([weights, intercepts], 1)[len(rates) + best]
        return linear_prediction(probe, test, chosen)


def shuffled(
    images: Images, positions: Tensor, size: int, epochs: int, seed: int
) -> Iterator[tuple[Batch, float, tuple[int, int]]]:
    """Batches in the order of (seed, epoch), how much of the training is done before each, and a key for its draws.

    Args:
        images: to take them from.
        positions: int64, of those that are taken.
        size: of a batch; an incomplete last one is left out, unless it is the only one.
        epochs: passes over them.
        seed: of the order.
    """
    steps = max(1, len(positions) // size)
    for epoch in range(epochs):
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(mixed((seed, epoch))))
        chunks: Any = list(positions[order].split(size))[:steps]
        loader: Any = DataLoader(images, batch_size=None, sampler=chunks, num_workers=images.num_workers)  # type: ignore[arg-type]
        for step, batch in enumerate(loader):
            done = epoch * steps + step
            yield batch, done / (epochs * steps), (seed, done)
