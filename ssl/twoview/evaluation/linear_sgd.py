"""Linear classification by SGD on augmented images, as in the papers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from twoview.augment import derive_seed
from twoview.data import Batch, Images
from twoview.errors import require_at_least, require_positive
from twoview.evaluation.invariance import IDENTITY
from twoview.evaluation.measure import ByName, Inputs, Measure, Workload
from twoview.evaluation.probe import Prediction, linear_prediction
from twoview.evaluation.progress import add_steps
from twoview.schedules import cosine_ramp


@dataclass(frozen=True)
class LinearSGD(Measure):
    """Linear classifier trained by SGD on frozen features of randomly cropped and flipped images.

    Sources: MoCo (arXiv:1911.05722, section 4.1) and SimCLR (arXiv:2002.05709, appendix B.5). Momentum is 0.9, there is
    no weight decay, and the learning rate follows a half cosine. Two classifiers are trained for each learning rate:
    one without the held-out images, to choose the learning rate, and one on all training images. All classifiers are
    trained in the same pass over the images.

    Args:
        sgd_lr: learning rates to choose from, for a batch of 256 images, > 0.
        sgd_epochs: number of epochs over the training images, at least 1.
        sgd_batch_size: number of images per step, at least 1.

    Raises:
        UserError: if a value is out of range.
    """

    name = "linear_sgd"
    probe_title = "linear, SGD"

    sgd_lr: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 30.0)
    sgd_epochs: int = 100
    sgd_batch_size: int = 256

    def __post_init__(self) -> None:
        require_positive("eval", sgd_lr=self.sgd_lr)
        require_at_least("eval", 1, sgd_epochs=self.sgd_epochs, sgd_batch_size=self.sgd_batch_size)

    def applies(self, inputs: Inputs) -> bool:
        """Return True for networks, False for raw pixels."""
        return inputs.encoder is not None

    def expected_seconds(self, work: Workload) -> float:
        """See :class:`Measure`. Augmentation takes about as long as the network."""
        return 2 * self.sgd_epochs * work.train * work.image_seconds

    def choose(self, inputs: Inputs, earlier: ByName) -> Prediction:
        """Train all classifiers, choose the learning rate on held-out labels, and classify the test images."""
        assert inputs.encoder is not None
        images, train, classes = inputs.train_images, inputs.train, inputs.classes
        fitted, held_out = inputs.split()
        rates = torch.tensor(sorted(self.sgd_lr)) * self.sgd_batch_size / 256
        is_fitted = torch.zeros(len(images), dtype=torch.bool)
        is_fitted[fitted] = True
        weights = torch.zeros(2 * len(rates), train.features.shape[1], classes, requires_grad=True)
        intercepts = torch.zeros(2 * len(rates), 1, classes, requires_grad=True)
        # One optimizer with learning rate 1: with SGD, to scale a loss is equivalent to scaling the learning rate.
        optimizer = torch.optim.SGD([weights, intercepts], lr=1.0, momentum=0.9)
        crops = {"crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3), "flip_p": 0.5}
        views = inputs.views.with_recipe(**{**IDENTITY, **crops}).to(inputs.device)
        everything = torch.arange(len(images))
        for batch, progress, key in shuffled(images, everything, self.sgd_batch_size, self.sgd_epochs, inputs.seed):
            view = views(batch.pixels.to(inputs.device), key, batch.sizes)[0]
            x = inputs.encoder.apply_network(view).cpu()
            scores = x @ weights + intercepts  # [2 R, B, C]
            each = F.cross_entropy(scores.flatten(0, 1), batch.labels.repeat(len(weights)), reduction="none")
            seen = torch.cat([is_fitted[batch.ids].expand(len(rates), -1), torch.ones(len(rates), len(x))])
            means = (each.view(len(weights), -1) * seen).sum(1) / seen.sum(1).clamp(min=1)
            optimizer.zero_grad()
            (rates.repeat(2) * means).sum().backward()
            optimizer.param_groups[0]["lr"] = cosine_ramp(progress, 1.0, 0.0)
            optimizer.step()
        with torch.no_grad():
            predicted = (train.features[held_out] @ weights + intercepts).argmax(2)
            accuracies = (predicted == train.labels[held_out]).double().mean(1)
            best = int(accuracies[: len(rates)].argmax())
            probe = torch.cat([weights, intercepts], 1)[len(rates) + best]
            chosen = {"val_top1": float(accuracies[best]), "lr": sorted(self.sgd_lr)[best]}
            return linear_prediction(probe, inputs.test, chosen)


def shuffled(
    images: Images, positions: Tensor, size: int, epochs: int, seed: int
) -> Iterator[tuple[Batch, float, tuple[int, int]]]:
    """Yield shuffled batches of all epochs; seed and epoch determine the order.

    Args:
        images: images of one split.
        positions: int64 ``[M]``, positions of the images to use.
        size: number of images per batch. An incomplete last batch is dropped unless it is the only batch.
        epochs: number of epochs.
        seed: seed of the order.

    Yields:
        The batch; the share of the training that is completed before it, in [0, 1); and a key for its random draws.
    """
    steps = max(1, len(positions) // size)
    add_steps(total=epochs * steps)
    for epoch in range(epochs):
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(derive_seed((seed, epoch))))
        chunks: Any = list(positions[order].split(size))[:steps]
        loader: Any = DataLoader(images, batch_size=None, sampler=chunks, num_workers=images.num_workers)
        for step, batch in enumerate(loader):
            done = epoch * steps + step
            yield batch, done / (epochs * steps), (seed, done)
            add_steps(done=1)
