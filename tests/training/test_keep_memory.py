"""Freed memory is kept in the process during training on a CPU, and returned afterwards."""

import resource
import subprocess
import sys
from dataclasses import replace

import pytest
from commands import environment
from short_runs import CPU, StopsAfter, pretrain

from twoview import allocator
from twoview.allocator import DEFAULTS, set_allocator
from twoview.errors import Interrupted
from twoview.training.callbacks import KeepMemory, keep_memory

glibc = pytest.mark.skipif(not set_allocator(DEFAULTS), reason="this C library is not glibc")
# Pages that the system hands out while a fresh process makes and frees large tensors. A fork of this process would use
# again what other tests have left free in its heap: trimmed, it is handed out once, and used again in later rounds. All
# tensors of a round are freed before the next one, or the heap would be divided into pieces that differ by its address.
PAGES = """
import resource
import torch
from twoview.allocator import DEFAULTS, KEPT, return_memory, set_allocator

def pages(rounds=3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        tensors = [torch.empty(size * 2**20, dtype=torch.uint8).fill_(1) for size in (40, 64, 48, 96, 36)]
        del tensors
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds

before = pages()
assert set_allocator(KEPT)
pages()
kept = pages()
set_allocator(DEFAULTS)
return_memory()
print(before, kept, pages())
"""


@glibc
def test_the_memory_of_large_tensors_is_used_again_while_it_is_kept_and_not_before_and_after():
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, env=environment(), check=True)
    before, kept, after = map(float, done.stdout.split())
    everything = 284 * 2**20 / resource.getpagesize()
    assert before > 0.9 * everything
    assert kept < 0.1 * everything
    assert after > 0.3 * everything


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


def test_nothing_is_kept_if_memory_is_scarce(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(keep_memory, "available_memory", lambda device: keep_memory.peak_memory() * 0.9)
    assert not any(recorded(tmp_path).kept)


def test_nothing_is_kept_without_glibc(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert not any(recorded(tmp_path).kept)
