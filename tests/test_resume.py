import csv
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
from twoview.heads import projection_head
from twoview.methods import MoCo, MoCoV3, SimCLR

ROOT = Path(__file__).parents[1]
METHODS = {
    "simclr": partial(SimCLR, temperature=0.2),
    "moco": partial(MoCo, queue_size=600, momentum=0.9),
    "moco_v3": partial(MoCoV3, predictor=partial(projection_head, hidden_dim=32, out_dim=32, last_bn=False)),
}
# Five batches an epoch; a kNN check, and so a checkpoint, after every second epoch.
TRAINING = runs.Training(max_epochs=4, accelerator="cpu", precision="32-true", log_every=1, check_every=2)


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
    images = short_data(batch_size=256)
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("after", "workers", "accumulate"),
    [(1, 0, 1), (3, 0, 1), (4, 2, 1), (11, 2, 1), (2, 0, 2), (5, 0, 2)],
    ids=["mid-epoch", "end of epoch", "first batch", "later, two workers", "accumulating", "accumulating, later"],
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
    with pytest.raises(UserError, match="this run is finished, after 20 steps; raise trainer.max_epochs"):
        go(tmp_path, "simclr", resume=True)
    report = go(tmp_path, "simclr", resume=True, training=replace(TRAINING, max_epochs=5))
    assert report["training"]["steps"] == 25


def test_what_would_not_be_exact_is_refused_in_one_sentence(tmp_path, whole):
    shutil.copytree(whole("simclr"), tmp_path, dirs_exist_ok=True)
    longer = replace(TRAINING, max_epochs=5)
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
    assert report["training"]["steps"] == 25


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_a_truncated_checkpoint_is_said_and_the_one_before_is_used(tmp_path, whole, keep, caplog):
    with pytest.raises(Interrupted):
        go(tmp_path, "moco", 3)
    with pytest.raises(Interrupted):
        go(tmp_path, "moco", 7, resume=True)
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
    "trainer.max_epochs=12",
    "trainer.check_every=1",
    "trainer.log_every=1",
    "eval.baselines=false",
    "eval.l2=[0.01]",
]


def start(folder, *arguments):
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"hydra.run.dir={folder}"]
    return subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("method", "number", "code"),
    [("simclr", "SIGTERM", 143), ("moco", "SIGKILL", -9), ("moco_v3", "SIGINT", 130)],
)
def test_a_process_that_is_killed(tmp_path, method, number, code):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole, f"method={method}", *ARGUMENTS)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    process = start(killed, f"method={method}", *ARGUMENTS)
    while not (killed / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert read_checkpoint(killed)["global_step"] < read_checkpoint(whole)["global_step"]
    if code > 0:
        assert "go on with resume=" in err
    process = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), f"resume={killed}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert_same(whole, killed)
