"""An optimizer step over several batches equals one over a big batch, also the shorter step at the end of an epoch."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from short_runs import CPU, learning_rates, pretrain
from torch.testing import assert_close

from twoview.methods import Method, Step
from twoview.optim import OptimizerSettings
from twoview.schedules import warmup_cosine

FROZEN = {
    "optimizer": OptimizerSettings(torch.optim.SGD),
    "schedule": lambda epoch, epochs: 0.0,
}  # equal weights at every step


class Recording(Method):
    """A loss that is a mean over images, without BatchNorm's batch statistics; records batches and gradients."""

    views: list
    gradients: list

    def encode(self, *views):
        self.eval()
        Recording.views.append(views[0].detach().clone())
        return super().encode(*views)

    def loss(self, encoded, ids=None, labels=None):
        Recording.method = self
        return Step(self.of(encoded.embeddings[0]), encoded.features, tuple(z.detach() for z in encoded.embeddings))

    def of(self, z):
        return z.square().sum(1).mean()

    def after_update(self, progress):
        Recording.gradients.append([p.grad.clone() for p in self.parameters()])


@pytest.mark.parametrize("accumulate", [1, 3, 4, 10])
def test_every_step_has_the_gradient_of_one_big_batch(tmp_path, accumulate):
    Recording.views, Recording.gradients = [], []
    trainer = replace(CPU, max_epochs=1, accumulate=accumulate, check_every=0)
    report = pretrain(tmp_path, method=Recording, trainer=trainer, settings=None, **FROZEN)
    parts = [Recording.views[i : i + accumulate] for i in range(0, 10, accumulate)]
    assert report["training"]["steps"] == len(Recording.gradients) == len(parts)
    method = Recording.method
    for part, found in zip(parts, Recording.gradients, strict=True):
        loss = method.of(method.head(method.backbone(torch.cat(part))))
        assert_close(found, list(torch.autograd.grad(loss, list(method.parameters()))), rtol=1e-4, atol=1e-6)


def test_the_schedule_counts_the_shorter_step(tmp_path):
    trainer = replace(CPU, max_epochs=2, accumulate=4, log_every=1)  # 3 steps an epoch
    schedule = partial(warmup_cosine, warmup_epochs=1 / 3)
    pretrain(tmp_path, trainer=trainer, settings=None, schedule=schedule, optimizer=OptimizerSettings(lr=1e-3))
    expected = [1e-3 * warmup_cosine(step / 3, 2, warmup_epochs=1 / 3) for step in range(6)]
    assert learning_rates(tmp_path) == pytest.approx(expected)
