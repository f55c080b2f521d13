"""Parts of an evaluation that run out of memory or are interrupted."""

import json
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import pytest
from evaluation.helpers_evaluation import AUGMENT, blobs, evaluate, quick
from evaluation.slow_measure import start
from short_runs import SIZE, make_inputs, pretrain, short_data

from twoview.errors import Interrupted, UserError
from twoview.evaluation import progress
from twoview.evaluation.evaluate import evaluate as evaluate_encoder, take
from twoview.evaluation.knn import KNN
from twoview.evaluation.measure import Measure
from twoview.evaluation.settings import EvaluationSettings
from twoview.loading import load
from twoview.reporting.tables import is_readable, tables

ERRORS = {
    "memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000 bytes."),
    "shapes": RuntimeError("shapes"),
    "user": UserError("eval.x=1: wrong"),
    "key": KeyError("x"),
}
SENTENCE = "out of memory; evaluate fewer images, or leave this part out of eval.parts (a tensor of 4 GB was asked for)"


@dataclass(frozen=True)
class Fails(Measure):
    """A measure that fails for some networks, or presses Ctrl-C."""

    name = "fails"

    how: str = "memory"
    where: str = ""
    phase: str = "choose"

    def _run(self, phase: str, network: str) -> dict[str, float]:
        if phase == self.phase and network.startswith(self.where):
            if self.how == "Ctrl-C":
                signal.raise_signal(signal.SIGINT)
            raise ERRORS[self.how]
        return {"value": 1.0}

    def choose(self, inputs: Any, earlier: Any) -> Any:
        return self._run("choose", inputs.name)

    def score(self, chosen: Any, inputs: Any, labels: Any) -> dict[str, float]:
        return self._run("score", inputs.name)


@pytest.fixture(scope="module")
def encoder():
    return load("random:test_resnet", image_size=SIZE, channels=1)


def with_part(*measures, **changes):
    return EvaluationSettings((KNN(k=(5,)), *measures), bootstrap=100, **changes)


@pytest.mark.parametrize("phase", ["choose", "score"])
def test_a_part_without_memory_is_reported_and_the_others_stand(encoder, tmp_path, caplog, phase):
    settings = with_part(Fails(phase=phase))
    report = evaluate(tmp_path, encoder, settings=settings)
    assert report["missing"] == {
        name: {"fails": SENTENCE} for name in ("trained", "random initialization", "raw pixels")
    }
    assert "incomplete" not in report
    assert all(set(row) == {"knn"} for row in report["results"].values())
    assert report["figures"]["val/knn_top1"] > 0
    assert caplog.text.count(f"fails: {SENTENCE}") == 3
    assert [table.title for table in tables(report)][1] == "Not measured"
    for name in ("report.md", "report.html"):
        assert "Not measured" in (tmp_path / name).read_text()


def test_a_baseline_without_memory_is_not_stored(encoder, tmp_path):
    cache = str(tmp_path / "cache")
    once = evaluate(tmp_path / "a", encoder, settings=with_part(Fails(where="raw"), cache=cache))
    assert once["missing"] == {"raw pixels": {"fails": SENTENCE}}
    assert len(list((tmp_path / "cache").iterdir())) == 5  # features of two networks and splits, one baseline
    again = evaluate(tmp_path / "b", encoder, settings=with_part(Fails(where="nowhere"), cache=cache))
    assert "missing" not in again
    assert again["results"]["raw pixels"]["knn"] == once["results"]["raw pixels"]["knn"]


def test_other_failures_end_the_evaluation(encoder, tmp_path):
    for how in ("shapes", "user", "key"):
        with pytest.raises(type(ERRORS[how])) as caught:
            evaluate(tmp_path, encoder, settings=with_part(Fails(how), baselines=False))
        assert caught.value is ERRORS[how]
    assert not (tmp_path / "report.json").exists()


def test_the_table_of_a_part_that_is_missing_for_the_network_is_left_out(encoder, tmp_path):
    report = evaluate(tmp_path, encoder, settings=quick("geometry", "clustering", baselines=False))
    titles = {table.title for table in tables(report)}
    assert {"Geometry", "Clustering"} <= titles
    part = report["results"]["trained"].pop("geometry")
    report["results"]["raw pixels"] = {"geometry": part}
    report["missing"] = {"trained": {"geometry": SENTENCE}}
    assert {table.title for table in tables(report)} == titles - {"Geometry"} | {"Not measured"}


@pytest.mark.parametrize("where", ["trained", "random"])
def test_what_is_finished_is_reported_after_an_interrupt(encoder, tmp_path, where):
    settings = with_part(Fails("Ctrl-C", where), *quick("retrieval", "clustering").measures)
    with pytest.raises(Interrupted, match=r"finished parts are in .*report\.json; repeat the command") as stopped:
        evaluate(tmp_path, encoder, settings=settings)
    assert stopped.value.code == 130
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["incomplete"] is True
    part = dict.fromkeys(("fails", "retrieval", "clustering"), "interrupted")
    whole = {"all": "interrupted"}
    if where == "trained":
        assert report["missing"] == {"trained": part, "random initialization": whole, "raw pixels": whole}
        assert {name: set(row) for name, row in report["results"].items()} == {"trained": {"knn"}}
    else:
        assert report["missing"] == {"random initialization": part, "raw pixels": whole}
        assert set(report["results"]["trained"]) == {"knn", "fails", "retrieval", "clustering"}
        assert set(report["results"]["random initialization"]) == {"knn"}
    assert "interrupted" in (tmp_path / "report.md").read_text()


def test_an_interrupt_after_the_last_choice_of_a_baseline_stops_too(encoder):
    class Interrupts:
        """A progress display in which Ctrl-C is pressed while it is removed."""

        def start(self, name):
            self.name = name

        def update(self, done, total):
            pass

        def stop(self):
            if self.name == "random initialization: knn" and not pressed:
                pressed.append(self.name)
                signal.raise_signal(signal.SIGINT)

    pressed, data = [], short_data()
    with progress.shown_by(Interrupts()):
        report, _ = evaluate_encoder(encoder, data, AUGMENT(**data.view_limits()), with_part(), seed=0)
    assert pressed
    assert report["incomplete"] is True
    assert set(report["results"]) == {"trained", "random initialization"}
    assert report["missing"] == {"raw pixels": {"all": "interrupted"}}


def test_an_interrupt_during_a_score_leaves_the_other_scores():
    (features, labels), settings = blobs(), with_part(Fails("Ctrl-C", phase="score"))
    measures = (settings.measures[1], settings.measures[0])
    taken = take(measures, make_inputs(features, labels, features), labels)
    assert set(taken.found) == {"knn"}
    assert (taken.missing, taken.stopped) == ({"fails": "interrupted"}, True)


def test_a_second_interrupt_stops_at_once():
    @dataclass(frozen=True)
    class Again(Fails):
        name = "again"

    (features, labels) = blobs()
    measures = (Fails("Ctrl-C", phase="score"), Again("Ctrl-C", phase="score"))
    with pytest.raises(KeyboardInterrupt):
        take(measures, make_inputs(features, labels, features), labels)


def test_an_incomplete_report_of_pretraining_is_not_final(finished):
    assert is_readable(finished.report)
    assert not is_readable(finished.report | {"incomplete": True})


def interrupted(folder, *arguments):
    """Start a command, press Ctrl-C in the slow part, and return the exit code and stderr."""
    process = start(folder, 120, *arguments)
    while "waiting" not in process.err.read_text():
        assert process.poll() is None, process.texts()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    return process.wait(60), process.texts()[1]


def test_ctrl_c_in_an_evaluation_leaves_a_report_that_a_repetition_completes(tmp_path):
    given = ("task=evaluate", "checkpoint=random:test_resnet", "data.image_size=16", "hydra.run.dir=r")
    knobs = ("eval=knn", "eval.parts=[knn,slow]", "eval.baselines=false")
    code, err = interrupted(tmp_path, *given, *knobs)
    assert code == 130, err
    assert f"finished parts are in {tmp_path}/r/report.json; repeat the command" in err
    assert "Traceback" not in err
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert (report["incomplete"], report["missing"]) == (True, {"trained": {"slow": "interrupted"}})
    assert set(report["results"]["trained"]) == {"knn"}
    process = start(tmp_path, 0, *given, *knobs)
    assert process.wait(100) == 0
    again = json.loads((tmp_path / "r" / "report.json").read_text())
    assert not again.keys() & {"incomplete", "missing"}
    assert again["results"]["trained"]["knn"] == report["results"]["trained"]["knn"]
    assert again["results"]["trained"]["slow"] == {"value": 1.0}


def test_ctrl_c_in_the_evaluation_of_a_pretraining_is_resumed(tmp_path):
    short = ("backbone.name=test_resnet", "data.image_size=10", "trainer.max_epochs=1", "hydra.run.dir=runs/a/r")
    knobs = ("eval.parts=[knn,slow]", "eval.baselines=false")
    code, err = interrupted(tmp_path, *short, *knobs)
    assert code == 130, err
    assert f"continue with resume={tmp_path}/runs/a/r" in err
    report = json.loads((tmp_path / "runs/a/r/report.json").read_text())
    assert report["incomplete"] is True
    assert report["training"]["steps"] == 10
    process = start(tmp_path, 0, *short[:-1], *knobs, "resume=auto")  # finds the run, whose report is incomplete
    assert process.wait(100) == 0
    again = json.loads((tmp_path / "runs/a/r/report.json").read_text())
    assert "incomplete" not in again
    assert set(again["results"]["trained"]) == {"knn", "slow"}
    assert again["results"]["trained"]["knn"] == report["results"]["trained"]["knn"]


def test_a_run_of_the_python_interface_is_resumed_after_an_interrupt(tmp_path):
    settings = with_part(Fails("Ctrl-C"), baselines=False)
    with pytest.raises(Interrupted, match="continue with resume="):
        pretrain(tmp_path, settings=settings)
    assert json.loads((tmp_path / "report.json").read_text())["incomplete"] is True
    report = pretrain(tmp_path, settings=with_part(Fails(where="nowhere"), baselines=False), resume=True)
    assert set(report["results"]["trained"]) == {"knn", "fails"}
    with pytest.raises(UserError, match="this run is finished"):
        pretrain(tmp_path, settings=settings, resume=True)


def test_all_parts_can_be_missing(encoder, tmp_path):
    report = evaluate(tmp_path, encoder, settings=EvaluationSettings((Fails(),), baselines=False))
    assert (report["results"], report["missing"]) == ({"trained": {}}, {"trained": {"fails": SENTENCE}})
