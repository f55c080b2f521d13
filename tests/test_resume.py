import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import pretrain, short_data
from lightning.pytorch.loggers import CSVLogger

from twoview import runs
from twoview.checkpoints import newest, read_checkpoint
from twoview.errors import Interrupted, UserError
from twoview.evaluate import Protocol
from twoview.heads import projection_head
from twoview.methods import MoCo, MoCoV3, SimCLR

ROOT = Path(__file__).parents[1]
METHODS = {
    "simclr": partial(SimCLR, temperature=0.2),
    "moco": partial(MoCo, queue_size=300, momentum=0.9),
    "moco_v3": partial(MoCoV3, predictor=partial(projection_head, hidden_dim=32, out_dim=32, last_bn=False)),
}
# Five batches an epoch; a kNN check, and so a checkpoint, after every second epoch.
TRAINING = runs.Training(max_epochs=3, accelerator="cpu", precision="32-true", log_every=1, check_every=2)


class Asks(CSVLogger):
    """A logger that sends this process a signal after some step."""

    def __init__(self, folder, after=None, number=signal.SIGUSR1):
        super().__init__(folder, name="", version="")
        self.after, self.number = after, number

    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)
        if self.after is not None and step == self.after:
            self.after = None
            os.kill(os.getpid(), self.number)


def data(workers=0):
    images = short_data(batch_size=128)
    images.pretrain = images.pretrain.subset(torch.arange(650))
    images.pretrain.num_workers = workers
    return images


def go(folder, method, after=None, workers=0, accumulate=1, number=signal.SIGUSR1, **changes):
    return pretrain(
        folder,
        **{
            "data": partial(data, workers),
            "method": METHODS[method],
            "training": replace(TRAINING, accumulate=accumulate),
            "protocol": None,
            "loggers": [Asks(folder, after, number)],
        }
        | changes,
    )


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [(row["step"], row["train/loss"], row["train/lr"]) for row in csv.DictReader(file) if row["train/loss"]]


def assert_same(folder, other):
    one, two = (read_checkpoint(f) for f in (folder, other))
    assert one["global_step"] == two["global_step"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    moments, others = (c["optimizer_states"][0]["state"] for c in (one, two))
    assert moments.keys() == others.keys()
    for key, state in moments.items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(others[key][name])) for name, v in state.items())
    if (folder / "metrics.csv").exists():
        assert losses(folder) == losses(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of uninterrupted runs, made when they are asked for."""
    made = {}

    def get(method, accumulate=1):
        if (method, accumulate) not in made:
            folder = tmp_path_factory.mktemp(f"{method}{accumulate}")
            go(folder, method, accumulate=accumulate)
            made[method, accumulate] = folder
        return made[method, accumulate]

    return get


@pytest.fixture(scope="module")
def stopped_twice(tmp_path_factory):
    """Folder of a run with a last checkpoint and one before."""
    folder = tmp_path_factory.mktemp("stopped")
    for after in (3, 7):
        with pytest.raises(Interrupted):
            go(folder, "moco", after, resume=True)
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("after", "workers", "accumulate"),
    [(1, 0, 1), (3, 0, 1), (4, 2, 1), (11, 2, 1), (2, 0, 2)],
    ids=["mid-epoch", "end of epoch", "first batch", "later, two workers", "accumulating"],
)
def test_a_stopped_run_goes_on_to_the_same_last_digit(tmp_path, whole, method, after, workers, accumulate):
    with pytest.raises(Interrupted, match="go on with resume=") as stopped:
        go(tmp_path, method, after, workers, accumulate)
    assert stopped.value.code == 143
    step = int(re.search(r"after step (\d+)", str(stopped.value))[1])
    assert read_checkpoint(tmp_path)["global_step"] == step == len(losses(tmp_path)) == after + 2
    report = go(tmp_path, method, None, workers, accumulate, resume=True)
    assert report["training"]["batches_without_step"] == (1 if method == "moco" else 0)
    assert_same(whole(method, accumulate), tmp_path)


def test_it_may_be_stopped_again_and_again(tmp_path, whole):
    for after in (0, 2, 8):
        with pytest.raises(Interrupted):
            go(tmp_path, "moco", after, resume=True)
    go(tmp_path, "moco", resume=True)
    assert_same(whole("moco"), tmp_path)


def test_handlers_are_given_back_and_an_earlier_one_is_called(tmp_path):
    called = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    mine = signal.getsignal(signal.SIGUSR2)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(Interrupted):
            go(tmp_path, "simclr", 1, number=signal.SIGUSR2)
        assert called == [signal.SIGUSR2]
        assert signal.getsignal(signal.SIGUSR2) is mine
        with pytest.raises(Interrupted) as stopped:
            go(tmp_path, "simclr", 5, number=signal.SIGINT, resume=True)
        assert stopped.value.code == 130
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_resuming_where_nothing_was_saved_begins_anew(tmp_path, whole):
    go(tmp_path, "simclr", resume=True)
    assert_same(whole("simclr"), tmp_path)


def test_a_finished_run_goes_on_with_more_epochs_only(tmp_path, whole):
    shutil.copytree(whole("simclr"), tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="this run is finished, after 15 steps; raise trainer.max_epochs"):
        go(tmp_path, "simclr", resume=True)
    report = go(tmp_path, "simclr", resume=True, training=replace(TRAINING, max_epochs=4))
    assert report["training"]["steps"] == 20


def test_what_would_not_be_exact_is_refused_in_one_sentence(tmp_path, whole):
    shutil.copytree(whole("simclr"), tmp_path, dirs_exist_ok=True)
    longer = replace(TRAINING, max_epochs=4)
    other = data()
    other.pretrain.pixels[0] = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(UserError, match=rf"threads was {threads}, is {threads + 1}.*resume.exact=false"):
            go(tmp_path, "simclr", resume=True, training=longer)
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(UserError, match="seed was 0, is 1"):
        go(tmp_path, "simclr", resume=True, training=longer, seed=1)
    with pytest.raises(UserError, match=r"data was \w+, is \w+\)"):
        go(tmp_path, "simclr", resume=True, training=longer, data=other)
    with pytest.raises(UserError, match="its networks are other ones"):
        go(tmp_path, "moco", resume=True, training=longer)
    report = go(tmp_path, "simclr", resume=True, training=longer, seed=1, exact=False)
    assert report["training"]["steps"] == 20


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_a_truncated_checkpoint_is_said_and_the_one_before_is_used(tmp_path, whole, stopped_twice, keep, caplog):
    shutil.copytree(stopped_twice, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:keep])
    assert newest(tmp_path)["global_step"] == 5
    assert "last.ckpt: cannot be read as a checkpoint" in caplog.text
    go(tmp_path, "moco", resume=True)
    assert_same(whole("moco"), tmp_path)


def test_a_folder_that_cannot_be_written_is_a_sentence_and_harms_nothing(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"best.ckpt could not be written .* go on with resume="):
        go(tmp_path, "simclr")


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
    """Folders of the methods' runs, which one sweep makes: a run of its own must come to the same."""
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
def test_a_process_that_is_killed(tmp_path, uninterrupted, method, number, code):
    whole, killed = uninterrupted[method], tmp_path / "killed"
    process = start(tmp_path, f"method={method}", f"hydra.run.dir={killed}", *ARGUMENTS)
    while not (killed / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    if method == "simclr":  # nobody else may work in its folder
        os.kill(process.pid, signal.SIGSTOP)
        _, err = start(tmp_path, f"resume={killed}").communicate(timeout=60)
        assert "another process is at work in this folder" in err
        os.kill(process.pid, signal.SIGCONT)
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert read_checkpoint(killed)["global_step"] < read_checkpoint(whole)["global_step"]
    if code > 0:
        assert "go on with resume=" in err
    process = start(tmp_path, f"resume={killed}")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert_same(whole, killed)


def test_a_run_that_was_killed_in_its_evaluation_only_repeats_that(tmp_path, whole):
    protocol = Protocol(l2=(0.01,), k=(5,), baselines=False)
    report = go(tmp_path, "moco", protocol=protocol)
    assert_same(whole("moco"), tmp_path)
    weights = (tmp_path / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    (tmp_path / "report.json").unlink()
    again = go(tmp_path, "moco", protocol=protocol, resume=True, identity="one")
    assert again["results"] == report["results"]
    assert again["training"]["images_seen"] == report["training"]["images_seen"]
    assert (tmp_path / "checkpoints" / "last.ckpt").stat().st_mtime_ns == weights
    # Now it is finished: the same report is given back, unless data or configuration are others, or it is asked for.
    written = (tmp_path / "report.json").stat().st_mtime_ns
    assert go(tmp_path, "moco", protocol=protocol, identity="one") == again
    assert (tmp_path / "report.json").stat().st_mtime_ns == written
    other = data()
    other.test.pixels[0] = 0
    with pytest.raises(UserError, match=r"data was \w+, is \w+.*rerun=true"):
        go(tmp_path, "moco", protocol=protocol, identity="one", resume=True, data=other)
    anew = go(tmp_path, "moco", protocol=protocol, identity="one", resume=True, data=other, rerun=True)
    assert anew["data_fingerprint"] != again["data_fingerprint"]
    assert_same(whole("moco"), tmp_path)
