"""Processes of a run that are killed, stopped or fail, and what several processes log."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import environment
from data.image_files import load, make_folder
from short_runs import CPU, RECIPE, SIZE
from two_ranks import on_two_ranks

from twoview.data import fake
from twoview.errors import UserError
from twoview.methods import Step
from twoview.training import RunSettings
from twoview.training.callbacks import training_logger
from twoview.training.pretraining import prepare
from twoview.training.ranks import Ranks

ENDLESS = ["data=fake", "data.images=256", "data.batch_size=32", "backbone.name=test_resnet", "data.image_size=16"]
ENDLESS += ["trainer=ddp", "trainer.devices=2", "trainer.max_epochs=100000", "trainer.check_every=1", "method=moco"]


def test_a_killed_process_ends_the_others_with_a_sentence_that_names_it(tmp_path):
    run_dir = tmp_path / "r"
    command = [sys.executable, "-m", "twoview", *ENDLESS, f"hydra.run.dir={run_dir}", "method.queue_size=64"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), text=True, **streams)
    try:
        while not (run_dir / "checkpoints/last.ckpt").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        (rank,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.kill(rank, signal.SIGKILL)
        err = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == 2, err
    lost = "rank 1 was killed by SIGKILL; the other processes were ended"
    assert err == f"twoview: {lost}; continue with resume={run_dir}\n"


def started(code):
    return subprocess.Popen([sys.executable, "-S", "-c", code])


# Code of the process of each rank but 0, a signal that is sent to it, and what is said.
LOST = {
    "killed": (["import time; time.sleep(60)", "raise SystemExit"], signal.SIGKILL, "rank 1 was killed by SIGKILL"),
    "stopped": (["import time; time.sleep(60)"], signal.SIGSTOP, r"rank 1 was stopped by a signal \(process \d+\)"),
    "failed": (["raise SystemExit(3)"], 0, "rank 1 ended with exit code 3"),
    "silent": (["import time; time.sleep(60)"], 0, "another process did not answer within trainer.timeout"),
    "killed among failed": (["raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)"], 0, "rank 2 was killed by"),
}


@pytest.mark.parametrize("name", LOST)
def test_a_lost_process_is_named(name, tmp_path):
    codes, number, message = LOST[name]
    ranks = Ranks(tmp_path)
    ranks.started = [started(code) for code in codes]
    if number:
        ranks.started[0].send_signal(number)
    found = ranks.error(RuntimeError("[gloo] Connection closed by peer"))
    assert isinstance(found, UserError)
    assert re.match(f"{message}.*; the other processes were ended; no checkpoint had been written$", str(found))
    ranks.end()
    assert all(process.wait(5) is not None for process in ranks.started)


def test_other_failures_are_not_those_of_another_process(tmp_path):
    assert Ranks(tmp_path).error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_the_rank_that_is_not_lost_leaves_the_sentence_to_rank_0(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        Ranks(tmp_path).error(RuntimeError("Connection closed by peer"))
    assert stop.value.code == 0
    orphan = Ranks(tmp_path)
    orphan.parent += 1
    assert "rank 0 was killed" in str(orphan.error(RuntimeError("Connection closed by peer")))


def step(rank, world):
    """Step of a method such as MoCo, whose loss and embeddings are those of one rank."""
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))[rank::world]
    return Step(rows.mean(), rows, (rows + 1, rows - 1), {"top1": rows[:, 0].mean()}, chance=float(rows[:, 1].mean()))


def log_rank(rank):
    return training_logger.figures(step(rank, 2))


def test_logged_figures_are_those_of_all_ranks():
    first, second = on_two_ranks(log_rank, timeout=20)
    assert first == second
    assert first == pytest.approx(training_logger.figures(step(0, 1)), abs=1e-6)


def prepared(tmp_path, devices, data):
    """A run of some processes, before the other processes are started."""
    return prepare(data, RECIPE, replace(CPU, devices=devices), RunSettings(run_dir=tmp_path / "r"), 0.2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Function that loads 20 images, of which 4 are held out."""
    return partial(load, make_folder(tmp_path_factory.mktemp("images"), each=10), channels=1, image_size=SIZE)


@pytest.mark.parametrize(("devices", "batch"), [(1, 16), (2, 16), (3, 15), (5, 15), (9, 9), (16, 16)])
def test_a_batch_that_was_not_chosen_is_a_multiple_of_the_processes(devices, batch, images, tmp_path, caplog):
    caplog.set_level("INFO")
    found = prepared(tmp_path, devices, partial(images, batch_size=None)).images.batch_size
    assert (found, type(found)) == (batch, int)
    assert caplog.text.count(f"the largest multiple of {devices} processes") == int(batch < 16)


def test_a_batch_that_was_chosen_and_too_many_processes_are_refused(images, tmp_path):
    with pytest.raises(UserError, match="data.batch_size=16: cannot be divided among 3 processes"):
        prepared(tmp_path, 3, partial(images, batch_size=16))
    with pytest.raises(UserError, match="trainer.devices: 17 processes, but folder has 16 images to learn from"):
        prepared(tmp_path, 17, partial(images, batch_size=None))


def test_more_processes_than_cores_are_warned_about(tmp_path, caplog):
    cores = os.cpu_count()
    for devices in (cores, cores + 1):
        caplog.clear()
        prepared(tmp_path, devices, fake(SIZE, channels=1, batch_size=2 * devices, images=2 * devices))
        warned = f"trainer.devices={devices}: more processes than cores ({cores}), so training is slow" in caplog.text
        assert warned == (devices > cores)
