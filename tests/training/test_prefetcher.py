"""Batches that are fetched ahead."""

from dataclasses import replace

import pytest
import torch
from short_runs import CPU, RECIPE, assert_same, pretrain, short_data
from torch.utils.data import DataLoader

from twoview.data import TensorImages
from twoview.loading import read_checkpoint
from twoview.schedules import constant
from twoview.training import RunSettings
from twoview.training.loader import BatchOrder, Prefetcher, PretrainingData
from twoview.training.pretraining import prepare
from twoview.training.trainer import fit


class Ahead(PretrainingData):
    """The loader of a GPU, without its streams."""

    def train_dataloader(self):
        return Prefetcher(super().train_dataloader(), torch.device("cpu"))


def images(n=10):
    return TensorImages(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n))


@pytest.mark.parametrize("done", [0, 2, 4])
def test_batches_equal_those_of_the_loader_and_one_is_fetched_ahead(done):
    fetched = []

    class Recorded(BatchOrder):
        def __iter__(self):
            for positions in super().__iter__():
                fetched.append(positions)
                yield positions

    def loader(cls):
        return DataLoader(images(), batch_size=None, sampler=cls(10, 2, 0, lambda: done))

    prefetcher = Prefetcher(loader(Recorded), torch.device("cpu"))
    assert len(prefetcher) == 5
    for i, (batch, wanted) in enumerate(zip(prefetcher, loader(BatchOrder), strict=True)):
        assert torch.equal(batch.ids, wanted.ids)
        assert torch.equal(batch.pixels.flatten().long(), batch.ids)
        assert len(fetched) == min(i + 2, 5 - done)


def test_a_run_with_batches_fetched_ahead_is_the_same_also_when_resumed(tmp_path):
    def train(folder, max_steps, checkpoint=None):
        settings = replace(CPU, max_epochs=None, max_steps=max_steps, check_every=0)
        run = prepare(short_data, replace(RECIPE, schedule=constant), settings, RunSettings(folder), holdout=0.2)
        fit(run.trainer, run.module, Ahead(run.images, 0), checkpoint)

    trainer = replace(CPU, max_epochs=None, max_steps=13, check_every=0)
    pretrain(tmp_path / "plain", trainer=trainer, settings=None, schedule=constant)
    train(tmp_path / "ahead", 13)
    assert_same(tmp_path / "ahead", tmp_path / "plain")
    train(tmp_path / "stopped", 7)  # in the middle of the first epoch
    train(tmp_path / "resumed", 13, tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert read_checkpoint(tmp_path / "resumed")["global_step"] == 13
    assert_same(tmp_path / "resumed", tmp_path / "plain")
