"""Processes that are killed, and resumed from the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT
from short_runs import assert_same

from twoview.loading import read_checkpoint

METHODS = ("simclr", "moco", "moco_v3")
ARGUMENTS = [
    "backbone.name=test_resnet",
    "data.image_size=16",
    "trainer.max_epochs=4",
    "trainer.check_every=1",
    "trainer.log_every=1",
    "eval.baselines=false",
    "eval.l2=[0.01]",
]


def start(folder, *arguments):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folders of uninterrupted runs by method, made by one sweep: a single run must give the same."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(folder, "-m", f"method={','.join(METHODS)}", *ARGUMENTS)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    reports = [json.loads(file.read_text()) for file in folder.glob("sweeps/*/report.json")]
    return {report["method"].lower().replace("v3", "_v3"): Path(report["run_dir"]) for report in reports}


@pytest.mark.parametrize(
    ("method", "number", "code"),
    [("simclr", "SIGTERM", 143), ("moco", "SIGKILL", -9), ("moco_v3", "SIGINT", 130)],
)
def test_a_killed_process_is_resumed_to_the_same_last_digit(tmp_path, uninterrupted, method, number, code):
    whole, killed = uninterrupted[method], tmp_path / "killed"
    process = start(tmp_path, f"method={method}", f"hydra.run.dir={killed}", *ARGUMENTS)
    while not (killed / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    if method == "simclr":  # another process may not work in the same folder
        os.kill(process.pid, signal.SIGSTOP)
        _, err = start(tmp_path, f"resume={killed}").communicate(timeout=60)
        assert "another process is working in this folder" in err
        os.kill(process.pid, signal.SIGCONT)
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert read_checkpoint(killed)["global_step"] < read_checkpoint(whole)["global_step"]
    if code > 0:
        assert "continue with resume=" in err
    process = start(tmp_path, f"resume={killed}")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert_same(whole, killed)
