"""Freed memory is kept in the process during training on a CPU, and returned afterwards."""

import resource
from dataclasses import replace

import pytest
import torch
from short_runs import CPU, StopsAfter, pretrain

from twoview.errors import Interrupted
from twoview.training.callbacks import KeepMemory, keep_memory
from twoview.training.callbacks.keep_memory import DEFAULTS, KEPT, set_allocator

glibc = pytest.mark.skipif(not set_allocator(DEFAULTS), reason="this C library is not glibc")
MIB_64 = 64 << 20
PAGES = MIB_64 // resource.getpagesize()


def faults_of_large_tensors():
    """Pages that the system hands out while tensors of 64 MiB are made and freed three times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.zeros(MIB_64, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
def test_the_memory_of_large_tensors_is_used_again_while_it_is_kept_and_not_before_and_after():
    before = faults_of_large_tensors()
    assert set_allocator(KEPT)
    try:
        faults_of_large_tensors()
        kept = faults_of_large_tensors()
    finally:
        set_allocator(DEFAULTS)
        keep_memory._glibc().malloc_trim(0)
    assert kept < PAGES / 10 < PAGES < before
    assert faults_of_large_tensors() > PAGES


class Recorder(StopsAfter):
    """Records whether memory is kept at the logged steps."""

    kept: list[bool]

    def __init__(self, folder, after=None):
        super().__init__(folder, after)
        self.callback, self.kept = None, []

    def log_metrics(self, metrics, step=None):
        if "train/loss" in metrics:
            self.kept.append(self.callback.kept)
        super().log_metrics(metrics, step)


@pytest.fixture
def recorded(monkeypatch):
    """A function that trains in a folder, and returns the callback and its logger."""

    def run(folder, after=None):
        logger = Recorder(folder, after)

        class Watched(KeepMemory):
            def __init__(self):
                super().__init__()
                logger.callback = self

        monkeypatch.setattr("twoview.training.callbacks.KeepMemory", Watched)
        try:
            pretrain(folder, trainer=replace(CPU, max_epochs=1, log_every=1), loggers=[logger])
        except Interrupted:
            assert after is not None
        return logger

    return run


@glibc
@pytest.mark.parametrize("after", [None, 2])
def test_a_run_keeps_memory_after_its_first_batch_until_it_ends_or_is_stopped(recorded, tmp_path, after):
    logger = recorded(tmp_path, after)
    assert logger.kept.count(True) >= 2
    assert not logger.callback.kept
    assert faults_of_large_tensors() > PAGES


def test_nothing_is_kept_if_memory_is_scarce(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(keep_memory, "available_memory", lambda device: keep_memory.peak_memory() * 0.9)
    assert not any(recorded(tmp_path).kept)


def test_nothing_is_kept_without_glibc(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(keep_memory, "_glibc", lambda: None)
    assert not any(recorded(tmp_path).kept)
