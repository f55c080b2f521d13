"""Devices, precision and memory."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from short_runs import CPU, losses, pretrain
from torch import nn

from twoview.errors import UserError
from twoview.training.trainer import build_trainer, choose_precision


@pytest.mark.parametrize("clip", [None, 0.5])
def test_bf16_trains(tmp_path, clip):
    report = pretrain(tmp_path, trainer=replace(CPU, precision="bf16-mixed", clip=clip), settings=None)
    assert report["training"]["precision"] == "bf16-mixed"
    assert all(math.isfinite(float(x)) for x in losses(tmp_path))


@pytest.mark.parametrize("precision", ["16-mixed", 16, "64-true"])
def test_a_precision_that_a_cpu_does_not_have_is_refused(tmp_path, precision):
    with pytest.raises(UserError, match="trainer.precision="):
        pretrain(tmp_path, trainer=replace(CPU, precision=precision))


@pytest.mark.parametrize(("precision", "name"), [("32", "32-true"), (32, "32-true"), ("bf16", "bf16-mixed")])
def test_short_names_of_precisions(precision, name):
    assert choose_precision(precision, nn.Identity(), torch.device("cpu")) == name


def test_automatic_precision_of_depthwise_networks_on_a_cpu_is_fp32():
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1))
    assert choose_precision("auto", depthwise, torch.device("cpu")) == "32-true"
    native = torch.cpu._is_avx512_bf16_supported()
    dense = choose_precision("auto", nn.Conv2d(4, 4, 3), torch.device("cpu"))
    assert dense == ("bf16-mixed" if native else "32-true")


def test_a_missing_accelerator_is_refused(tmp_path):
    with pytest.raises(UserError, match="trainer.accelerator=gpu"):
        pretrain(tmp_path, trainer=replace(CPU, accelerator="gpu"))


def test_out_of_memory_is_reported_in_a_sentence(tmp_path):
    script = f"""
import resource, sys, torch
from pathlib import Path
from twoview import cli, runs
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 600 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = ["twoview", "data=fake", "data.images=2048", "data.image_size=32", "data.batch_size=2048",
            "trainer.precision=32-true", "trainer.max_epochs=1", "hydra.run.dir={tmp_path}/run"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("twoview: data.batch_size=2048: out of memory; try a smaller data.batch_size")
    assert "Traceback" not in done.stderr


def test_a_job_of_slurm_with_one_task_trains_on_all_devices(tmp_path, monkeypatch):
    job = {"JOB_ID": "1", "JOB_NAME": "pretraining", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    trainer = build_trainer(replace(CPU, devices=2), nn.Linear(2, 2), [], [], tmp_path)
    assert trainer.world_size == 2
