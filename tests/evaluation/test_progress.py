"""Announcement, progress and durations of an evaluation."""

import os
import pty
import re
import select
import time

import pytest
import torch
from evaluation.helpers_evaluation import AUGMENT, digits_data, evaluate, quick
from evaluation.slow_measure import start
from short_runs import SIZE, short_data

from twoview.data import ImageData
from twoview.evaluation import progress
from twoview.evaluation.evaluate import evaluate as evaluate_encoder
from twoview.evaluation.integrity import thumbnails
from twoview.loading import load


@pytest.fixture(scope="module")
def encoder():
    return load("random:test_resnet", image_size=SIZE, channels=1)


def test_the_first_line_tells_what_is_measured_and_how_long_it_takes(encoder, tmp_path, caplog):
    caplog.set_level("INFO", "twoview.evaluation")
    data = digits_data()
    evaluate(tmp_path, encoder, data, quick("knn", "geometry"))
    first = caplog.messages[0]
    networks = "trained, random initialization, raw pixels"
    number = f"{len(data.train):,} training and {len(data.test):,} test images"
    assert re.fullmatch(rf"evaluation: knn, geometry of {networks} on {number}; (about \d+ s|a few seconds)", first)
    caplog.clear()
    evaluate(tmp_path, encoder, data, quick("knn", baselines=False, cache=str(tmp_path / "cache")))
    assert caplog.messages[0].startswith(f"evaluation: knn of trained on {number}; ")
    assert caplog.messages[0].endswith(", less for what is in eval.cache")


def test_a_part_of_over_five_seconds_is_logged(caplog, monkeypatch):
    caplog.set_level("INFO", "twoview.evaluation")
    monkeypatch.setattr(progress, "LONG", 0.05)
    with progress.part("short"):
        pass
    with progress.part("long"):
        time.sleep(0.1)
    assert caplog.messages == ["evaluation: long took 0 s"]


class Recorder:
    """A display that records its calls."""

    def __init__(self):
        self.calls = []

    def start(self, name):
        self.calls.append(name)

    def update(self, done, total):
        self.calls.append((done, total))

    def stop(self):
        self.calls.append("stop")


def test_steps_are_counted_over_several_sequences_and_end_with_the_part():
    display = Recorder()
    with progress.shown_by(display):
        with progress.part("a"):
            assert list(progress.track("xy")) == ["x", "y"]
            list(progress.track([1]))
        with pytest.raises(KeyError), progress.part("b"):
            raise KeyError
        progress.add_steps(done=1)  # in no part
    with progress.part("not shown"):
        list(progress.track([1]))
    assert display.calls == ["a", (0, 2), (1, 2), (2, 2), (2, 3), (3, 3), "stop", "b", "stop"]


def test_center_squares_of_images_are_counted():
    display, images = Recorder(), short_data().test
    with progress.shown_by(display), progress.part("center squares"):
        thumbnails(images)
    assert display.calls[1:-1] == [(0, len(images)), (len(images), len(images))]  # a single batch


@pytest.mark.parametrize("measure", ["knn", "retrieval", "few_labels", "invariance", "integrity", "linear_sgd"])
def test_the_steps_of_a_measure_end_at_their_total(encoder, measure):
    display, settings = Recorder(), quick(measure, baselines=False, sgd_epochs=1)
    data = short_data()
    train, test = data.train.subset(torch.arange(300)), data.test.subset(torch.arange(100))
    data = ImageData(train, train, test, data.classes, 128, "digits", allow_flip=False, min_crop_area=0.3)
    with progress.shown_by(display):
        evaluate_encoder(encoder, data, AUGMENT(**data.view_limits()), settings, seed=0)
    names = [call for call in display.calls if isinstance(call, str) and call != "stop"]
    assert names[-1].startswith("trained: ")
    features = display.calls[display.calls.index("trained: features") + 1 :]
    steps = features[: features.index("stop")]
    assert steps[-1] == (400, 400)
    start = display.calls.index(f"trained: {measure}")
    steps = [call for call in display.calls[start:] if isinstance(call, tuple)]
    assert steps[-1][0] == steps[-1][1] > 0


def read_terminal(process, terminal, seconds):
    """Exit code of a process, and what it shows in a terminal until it ends."""
    shown, code, end = b"", None, time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the process has closed it
                break
        elif (code := process.poll()) is not None:
            break
    return process.wait(30) if code is None else code, shown.decode(errors="replace")


@pytest.mark.parametrize("in_terminal", [True, False])
def test_the_bar_of_a_long_part_is_shown_in_a_terminal_only(tmp_path, in_terminal):
    given = ("task=evaluate", "checkpoint=random:test_resnet", "data.image_size=16", "hydra.run.dir=r")
    knobs = ("eval=knn", "eval.parts=[knn,slow]", "eval.baselines=false")
    ours, theirs = pty.openpty()

    def to_terminal():
        for stream in (1, 2) if in_terminal else (2,):
            os.dup2(theirs, stream)

    process = start(tmp_path, 7, *given, *knobs, prepare=to_terminal)
    os.close(theirs)
    code, shown = read_terminal(process, ours, 100)
    os.close(ours)
    assert code == 0, shown
    log = (tmp_path / "r" / "run.log").read_text()
    assert "evaluation: trained: slow took" in log
    assert "knn took" not in log
    bar = re.findall(r"evaluation: trained: slow .*?(\d+)%.*?0:00:0\d", shown)
    assert bool(bar) == in_terminal, shown
    if in_terminal:
        assert int(bar[0]) >= 50  # not before five of seven seconds
        assert "trained: knn " not in shown
