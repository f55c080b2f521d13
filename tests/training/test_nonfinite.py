"""Losses and weights that are not finite."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from short_runs import CPU, RECIPE, pretrain, short_data
from two_ranks import on_two_ranks

from twoview.errors import UserError
from twoview.loading import read_checkpoint
from twoview.methods import MoCo, SimCLR
from twoview.optim import OptimizerSettings
from twoview.schedules import constant
from twoview.training import RunSettings
from twoview.training.finite import BatchLoss, LossCheck
from twoview.training.loader import BatchOrder
from twoview.training.pretraining import prepare, train


class Breaks(MoCo):
    """A method whose loss is not a number for the batch that contains image 7."""

    def __init__(self, backbone, head):
        super().__init__(backbone, head, queue_size=200)

    def forward(self, view_a, view_b, ids=None, labels=None):
        bad = bool((ids == 7).any())
        step = super().forward(view_a * (float("nan") if bad else 1), view_b, ids=ids, labels=labels)
        assert bool(step.loss.isfinite()) != bad
        return step


class BreaksAt(SimCLR):
    """A method whose loss is not a number from the given batch on, whose weights are then not finite."""

    def __init__(self, backbone, head, batch):
        super().__init__(backbone, head)
        self.left = batch

    def forward(self, view_a, view_b, ids=None, labels=None):
        self.left -= 1
        return super().forward(view_a * (float("nan") if self.left < 0 else 1), view_b, ids=ids, labels=labels)


def train_reading_together(folder, method, every):
    """A run in which the losses of several batches are read together, as on a GPU."""
    run = prepare(short_data, replace(RECIPE, method=method), CPU, RunSettings(folder), holdout=0.2)
    run.module.losses.every = every
    train(run)


def batches_with(image):
    """Optimizer steps before the batch of an image, and the images of the batch, in each of two epochs."""
    batches = list(BatchOrder(1347, 128, 0, lambda: 0)) + list(BatchOrder(1347, 128, 0, lambda: 10))
    return [(number, batch.tolist()) for number, batch in enumerate(batches) if image in batch]


def test_divergence_is_reported_in_a_sentence(tmp_path):
    sentence = (
        r"at step \d+ the loss is nan .* training has diverged; lower optimizer.lr .*no checkpoint had been written"
    )
    with pytest.raises(UserError, match=sentence):
        pretrain(tmp_path, optimizer=OptimizerSettings(torch.optim.SGD, lr=1e20), schedule=constant)


def test_a_nan_loss_ends_the_run_with_the_batch_and_the_last_good_checkpoint(tmp_path):
    (first, images), (second, later) = batches_with(7)
    with pytest.raises(UserError, match=rf"at step {first} the loss is nan .*no checkpoint had been written"):
        pretrain(tmp_path, method=Breaks, settings=None)
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": first, "loss": "nan", "images": images}
    folder = tmp_path / "second"
    with pytest.raises(UserError, match=rf"at step {second} the loss is nan .*checkpoint is .*last.ckpt"):
        pretrain(folder, method=Breaks, settings=None, trainer=replace(CPU, skip_nonfinite=1))
    content = read_checkpoint(folder)
    assert content["global_step"] == 10
    assert content["twoview"]["skipped"] == 1
    assert json.loads((folder / "nonfinite.jsonl").read_text().splitlines()[1])["images"] == later


@pytest.mark.parametrize("bad", [0, 5, 9])
@pytest.mark.parametrize("every", [4, 1000])
def test_losses_that_are_read_together_name_the_first_bad_batch(tmp_path, every, bad):
    images = list(BatchOrder(1347, 128, 0, lambda: 0))[bad].tolist()
    with pytest.raises(UserError, match=rf"at step {bad} the loss is nan .*no checkpoint had been written"):
        train_reading_together(tmp_path, partial(BreaksAt, batch=bad), every)
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": bad, "loss": "nan", "images": images}
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_losses_are_read_before_every_save(tmp_path):
    with pytest.raises(UserError, match=r"at step 13 the loss is nan .*checkpoint is .*last.ckpt"):
        train_reading_together(tmp_path, partial(BreaksAt, batch=13), 1000)
    content = read_checkpoint(tmp_path)
    assert content["global_step"] == 10
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def read_on(rank):
    check = LossCheck(every=3)
    for step, losses in enumerate([(1.0, 2.0), (3.0, float("inf")), (float("nan"), 4.0)]):
        check.add(BatchLoss(step, torch.tensor(losses[rank]), torch.tensor([10 * step + rank])))
    found = check.first_not_finite()
    return found.step, float(found.loss), found.ids.tolist()


def test_all_ranks_find_the_same_batch():
    assert sorted(on_two_ranks(read_on, timeout=30)) == [(1, 3.0, [10]), (1, float("inf"), [11])]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_batch_leaves_no_trace(tmp_path, accumulate, caplog):
    trainer = replace(CPU, skip_nonfinite=2, accumulate=accumulate)
    report = pretrain(tmp_path, method=Breaks, settings=None, trainer=trainer)
    assert report["training"]["batches_not_finite"] == 2
    assert "the batch is skipped, 2 of 2" in caplog.text
    state = read_checkpoint(tmp_path)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())  # statistics of BatchNorm and the queue too
    keys = state["method.queue.keys"]
    assert (keys.norm(dim=1) - 1).abs().max() < 1e-4


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Spoils(SimCLR):
        def after_update(self, progress):
            if progress == 1:
                next(self.parameters()).data.fill_(float("inf"))

    method = partial(Spoils, temperature=0.2)
    with pytest.raises(UserError, match="the weights are not finite"):
        pretrain(tmp_path, method=method, settings=None, trainer=replace(CPU, check_every=0))
    assert not list((tmp_path / "checkpoints").glob("*"))
