"""Runs of two processes, from the command line and under torchrun."""

import hashlib
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import torch
from commands import short
from hostile_runs import run, start
from short_runs import SIZE, assert_same, pretrain
from two_ranks import as_script, under_torchrun

from twoview.augment import TwoViews
from twoview.cli import main
from twoview.loading import read_checkpoint
from twoview.training import TrainerSettings

TWO = ["method=moco", "trainer=ddp", "trainer.devices=2", "trainer.log_every=1"]

RAMP = torch.arange(SIZE**2, dtype=torch.uint8).view(1, 1, SIZE, SIZE)


class Recorded(TwoViews):
    """Writes hashes of the views of an image that is the same on every rank: only the draws can differ."""

    def forward(self, pixels, key=None, sizes=None):
        same = super().forward(pixels[:1] * 0 + 128 + RAMP, key=key)
        with Path(os.environ["RANK"]).open("a") as file:
            for view in same:
                print(hashlib.sha256(view.contiguous().numpy().tobytes()).hexdigest(), file=file)
        return super().forward(pixels, key=key)


def record():
    trainer = TrainerSettings(max_epochs=2, accelerator="cpu", devices=2, precision="32-true", check_every=0)
    augment = partial(Recorded, crop_scale=(0.4, 1.0), flip_p=0.0)
    pretrain(Path("run"), augment=augment, trainer=trainer, settings=None)


def test_two_ranks_never_draw_the_same_augmentation(tmp_path):
    code, _, err = under_torchrun(tmp_path, record)
    assert code == 0, err
    drawn = [(tmp_path / rank).read_text().split() for rank in ("0", "1")]
    assert len(drawn[0]) == len(drawn[1]) == 2 * 2 * 10  # two views of ten batches in two epochs
    assert len({*drawn[0], *drawn[1]}) == 80


def has_ended(group):
    """Whether no process of a group is left."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_two_ranks_that_are_stopped_continue_to_the_same_last_digit(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = run(tmp_path, *short(*TWO, f"hydra.run.dir={whole}"), limit=250, prepare=as_script)
    assert result.code == 0, result.err
    process = start(tmp_path, *short(*TWO, f"hydra.run.dir={stopped}"), prepare=as_script)
    while not (stopped / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.texts()[1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    code, (_, err) = process.wait(60), process.texts()
    assert code == 143, err
    assert "continue with resume=" in err
    assert "Traceback" not in err
    assert has_ended(process.pid)
    assert read_checkpoint(stopped)["global_step"] < read_checkpoint(whole)["global_step"]
    result = run(tmp_path, f"resume={stopped}", limit=250, prepare=as_script)
    assert result.code == 0, result.err
    assert_same(whole, stopped)


def test_ranks_of_an_optuna_trial_have_the_same_configuration(tmp_path):
    sweep = ["-m", "hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "hydra.sweeper.n_trials=2"]
    one_epoch = ["trainer.max_epochs=1", "trainer=ddp", "trainer.devices=2"]
    result = run(tmp_path, *short(*sweep, *one_epoch), limit=250, prepare=as_script)
    assert result.code == 0, result.err
    rates = {}
    for file in tmp_path.glob("sweeps/*/run.log"):
        found = re.findall(
            r"(rank 1 )?INFO twoview.training.pretraining: AdamW weights.*learning rate (\S+)", file.read_text()
        )
        assert [rank for rank, _ in found] == ["", "rank 1 "]
        assert found[0][1] == found[1][1]
        rates[file.parent.name] = found[0][1]
    assert len(rates) == len(set(rates.values())) == 2


def test_torchrun_and_the_number_of_devices_must_agree(tmp_path):
    code, _, err = under_torchrun(tmp_path, main, *short())
    assert code != 0
    assert "torchrun has started 2 processes here; give trainer=ddp trainer.devices=2" in err
    assert len(list(tmp_path.glob("runs/*/*"))) == 1  # one folder for both
