"""Runs that are stopped by a signal and resumed, in this process."""

import re
import shutil
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from short_runs import StopsAfter, assert_same, losses, pretrain, short_data

from twoview.errors import Interrupted, UserError
from twoview.evaluation import EvaluationSettings
from twoview.heads import projection_head
from twoview.loading import read_checkpoint
from twoview.methods import MoCo, MoCoV3, SimCLR
from twoview.training import TrainerSettings
from twoview.training.checkpoints import newest

METHODS = {
    "simclr": partial(SimCLR, temperature=0.2),
    "moco": partial(MoCo, queue_size=300, momentum=0.9),
    "moco_v3": partial(MoCoV3, predictor=partial(projection_head, hidden_dim=32, out_dim=32, last_bn=False)),
}
# Five batches an epoch; a kNN check, and so a checkpoint, after every second epoch.
TRAINER = TrainerSettings(max_epochs=3, accelerator="cpu", precision="32-true", log_every=1, check_every=2)
LONGER = replace(TRAINER, max_epochs=4)


def data(workers=0):
    images = short_data(batch_size=128)
    images.pretrain = images.pretrain.subset(torch.arange(650))
    images.pretrain.loaders = workers
    return images


def train(folder, method, after=None, workers=0, accumulate=1, number=signal.SIGUSR1, **changes):
    defaults = {
        "data": partial(data, workers),
        "method": METHODS[method],
        "trainer": replace(TRAINER, accumulate=accumulate),
        "settings": None,
        "loggers": [StopsAfter(folder, after, number)],
    }
    return pretrain(folder, **(defaults | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of uninterrupted runs, which are made when they are first asked for."""
    made = {}

    def get(method, accumulate=1):
        if (method, accumulate) not in made:
            folder = tmp_path_factory.mktemp(f"{method}{accumulate}")
            train(folder, method, accumulate=accumulate)
            made[method, accumulate] = folder
        return made[method, accumulate]

    return get


@pytest.fixture(scope="module")
def stopped_twice(tmp_path_factory):
    """Folder of a run with a last checkpoint and one before."""
    folder = tmp_path_factory.mktemp("stopped")
    for after in (3, 7):
        with pytest.raises(Interrupted):
            train(folder, "moco", after, resume=True)
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("after", "workers", "accumulate"),
    [(1, 0, 1), (3, 0, 1), (4, 2, 1), (11, 2, 1), (2, 0, 2)],
    ids=["mid-epoch", "end of epoch", "first batch", "later, two workers", "accumulating"],
)
def test_a_stopped_run_continues_to_the_same_last_digit(tmp_path, whole, method, after, workers, accumulate):
    with pytest.raises(Interrupted, match="continue with resume=") as stopped:
        train(tmp_path, method, after, workers, accumulate)
    assert stopped.value.code == 143
    step = int(re.search(r"after step (\d+)", str(stopped.value))[1])
    assert read_checkpoint(tmp_path)["global_step"] == step == len(losses(tmp_path)) == after + 2
    report = train(tmp_path, method, None, workers, accumulate, resume=True)
    assert report["training"]["batches_without_step"] == (1 if method == "moco" else 0)
    assert_same(whole(method, accumulate), tmp_path)


def test_a_run_may_be_stopped_several_times(tmp_path, whole):
    for after in (0, 2, 8):
        with pytest.raises(Interrupted):
            train(tmp_path, "moco", after, resume=True)
    train(tmp_path, "moco", resume=True)
    assert_same(whole("moco"), tmp_path)


def test_signal_handlers_are_restored_and_an_earlier_one_is_called(tmp_path):
    called = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    mine = signal.getsignal(signal.SIGUSR2)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(Interrupted):
            train(tmp_path, "simclr", 1, number=signal.SIGUSR2)
        assert called == [signal.SIGUSR2]
        assert signal.getsignal(signal.SIGUSR2) is mine
        with pytest.raises(Interrupted) as stopped:
            train(tmp_path, "simclr", 5, number=signal.SIGINT, resume=True)
        assert stopped.value.code == 130
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_resuming_where_nothing_was_saved_starts_from_the_beginning(tmp_path, whole):
    train(tmp_path, "simclr", resume=True)
    assert_same(whole("simclr"), tmp_path)


def test_without_resume_a_run_starts_from_the_beginning(tmp_path, whole):
    with pytest.raises(Interrupted):
        train(tmp_path, "simclr", 3)
    train(tmp_path, "simclr")
    assert_same(whole("simclr"), tmp_path)


def test_a_finished_run_continues_with_more_epochs_only(tmp_path, whole):
    shutil.copytree(whole("simclr"), tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="this run is finished, after 15 steps; raise trainer.max_epochs"):
        train(tmp_path, "simclr", resume=True)
    report = train(tmp_path, "simclr", resume=True, trainer=LONGER)
    assert report["training"]["steps"] == 20


def test_resuming_that_would_not_be_exact_is_refused_in_one_sentence(tmp_path, whole):
    shutil.copytree(whole("simclr"), tmp_path, dirs_exist_ok=True)
    other = data()
    other.pretrain.pixels[0] = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(UserError, match=rf"threads was {threads}, is {threads + 1}.*resume.exact=false"):
            train(tmp_path, "simclr", resume=True, trainer=LONGER)
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(UserError, match="seed was 0, is 1"):
        train(tmp_path, "simclr", resume=True, trainer=LONGER, seed=1)
    with pytest.raises(UserError, match=r"data was \w+, is \w+\)"):
        train(tmp_path, "simclr", resume=True, trainer=LONGER, data=other)
    with pytest.raises(UserError, match="the checkpoint holds other networks"):
        train(tmp_path, "moco", resume=True, trainer=LONGER)
    report = train(tmp_path, "simclr", resume=True, trainer=LONGER, seed=1, exact=False)
    assert report["training"]["steps"] == 20


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_a_truncated_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, whole, stopped_twice, keep, caplog):
    shutil.copytree(stopped_twice, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:keep])
    assert newest(tmp_path)["global_step"] == 5
    assert "last.ckpt: cannot be read as a checkpoint" in caplog.text
    train(tmp_path, "moco", resume=True)
    assert_same(whole("moco"), tmp_path)


def test_a_folder_that_cannot_be_written_is_reported_in_a_sentence(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"best.ckpt could not be written .* continue with resume="):
        train(tmp_path, "simclr")


def test_a_run_that_was_killed_in_its_evaluation_repeats_only_that(tmp_path, whole):
    settings = EvaluationSettings.from_knobs(l2=(0.01,), k=(5,), baselines=False)
    report = train(tmp_path, "moco", settings=settings)
    assert_same(whole("moco"), tmp_path)
    weights = (tmp_path / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    (tmp_path / "report.json").unlink()
    again = train(tmp_path, "moco", settings=settings, resume=True, identity="one")
    assert again["results"] == report["results"]
    assert again["training"]["images_seen"] == report["training"]["images_seen"]
    assert (tmp_path / "checkpoints" / "last.ckpt").stat().st_mtime_ns == weights
    # The run is finished now: its report is returned, unless data or identity differ or a rerun is asked for.
    written = (tmp_path / "report.json").stat().st_mtime_ns
    assert train(tmp_path, "moco", settings=settings, identity="one") == again
    assert (tmp_path / "report.json").stat().st_mtime_ns == written
    other = data()
    other.test.pixels[0] = 0
    with pytest.raises(UserError, match=r"data was \w+, is \w+.*rerun=true"):
        train(tmp_path, "moco", settings=settings, identity="one", resume=True, data=other)
    rerun = train(tmp_path, "moco", settings=settings, identity="one", resume=True, data=other, rerun=True)
    assert rerun["data_fingerprint"] != again["data_fingerprint"]
    assert_same(whole("moco"), tmp_path)
