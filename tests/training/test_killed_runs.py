"""Processes that are killed, and resumed from the command line."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from hostile_runs import run, start
from short_runs import assert_same

from twoview.loading import read_checkpoint

METHODS = ("simclr", "moco", "moco_v3")
ARGUMENTS = [
    "backbone.name=test_resnet",
    "backbone.stem=small_stride2",
    "data.image_size=10",
    "trainer.max_epochs=3",
    "trainer.check_every=1",
    "trainer.log_every=1",
    "eval.baselines=false",
    "eval.l2=[0.01]",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folders of uninterrupted runs by method, made by one sweep: a single run must give the same."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    outcome = run(folder, "-m", f"method={','.join(METHODS)}", *ARGUMENTS, limit=250)
    assert outcome.code == 0, outcome.err
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
        assert process.poll() is None, process.texts()[1]
        time.sleep(0.05)
    if method == "simclr":  # another process may not work in the same folder
        os.kill(process.pid, signal.SIGSTOP)
        assert "another process is working in this folder" in run(tmp_path, f"resume={killed}", limit=60).err
        os.kill(process.pid, signal.SIGCONT)
    os.kill(process.pid, getattr(signal, number))
    ended, (_, err) = process.wait(60), process.texts()
    assert ended == code, err
    assert "Traceback" not in err
    assert read_checkpoint(killed)["global_step"] < read_checkpoint(whole)["global_step"]
    if code > 0:
        assert "continue with resume=" in err
    outcome = run(tmp_path, f"resume={killed}", limit=200)
    assert outcome.code == 0, outcome.err
    assert_same(whole, killed)
