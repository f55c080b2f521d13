import csv
import json
import os
import signal
import time

import pytest
from commands import short
from hostile_runs import run, start

from twoview.cli import sweeps


def record(monkeypatch, folder, *runs):
    monkeypatch.setenv(sweeps.VARIABLE, str(folder))
    for number, (overrides, figure, mistake) in enumerate(runs):
        sweeps.record(number, overrides.split(), f"sweeps/{number}", "val/linear_top1", figure, mistake)


def test_mean_and_deviation_are_over_seeds(tmp_path, monkeypatch, capsys):
    record(
        monkeypatch,
        tmp_path,
        ("method=simclr seed=0 trainer=short", 0.5, None),
        ("method=simclr seed=1 trainer=short", 0.7, None),
        ("method=moco seed=0 trainer=short", 0.8, None),
        ("method=moco seed=1 trainer=short", None, "it broke"),
        *((f"method=supcon seed={seed} trainer=short", 0.1, None) for seed in range(7)),
    )
    runs = sweeps.outcomes(tmp_path)
    assert [row["seed"] for row in runs[:4]] == ["0", "1", "0", "1"]
    assert all(list(row["overrides"]) == ["method"] for row in runs)  # trainer=short does not differ
    for row in runs[:2]:
        assert row["mean"] == pytest.approx(0.6)
        assert row["deviation"] == pytest.approx(0.2 / 2**0.5)
    assert (runs[2]["mean"], runs[2]["deviation"]) == (0.8, None)
    assert len(runs) == 11  # in the order of their numbers, not of their names
    assert sweeps.summarize(tmp_path) == 1
    shown = capsys.readouterr()
    assert "60.00 %" in shown.out
    assert "14.14 %" in shown.out
    assert shown.err == "twoview: sweeps/3 failed: it broke\n"
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows[:4]] == ["simclr", "simclr", "moco", "moco"]
    assert rows[3]["mistake"] == "it broke"
    assert float(rows[0]["val/linear_top1"]) == 0.5


def test_runs_that_take_other_knobs_stand_in_one_table(tmp_path, monkeypatch):
    record(monkeypatch, tmp_path, ("method=moco method.queue_size=64", 0.5, None), ("method=simclr", 0.25, None))
    runs = sweeps.outcomes(tmp_path)
    assert runs[1]["overrides"] == {"method": "simclr", "method.queue_size": ""}
    assert [row["mean"] for row in runs] == [0.5, 0.25]


def test_outside_of_a_sweep_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(sweeps.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    sweeps.record(0, ["seed=1"], "runs/x", "val/linear_top1", 0.5, None)
    assert not list(tmp_path.iterdir())


def table(folder):
    with max(folder.glob("sweeps/*/table.csv")).open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_that_was_killed_goes_on_and_a_failing_run_stops_no_other(tmp_path):
    # 1e20 diverges in the third step; seeds 0 and 1 do not.
    sweep = ["-m", "optimizer.lr=4e-3,1e20", "seed=0,1"]
    process = start(tmp_path, *short(*sweep))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("sweeps/*/checkpoints/last.ckpt"))) < 2:  # one is done, another in the middle
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (done,) = tmp_path.glob("sweeps/*/report.json")
    before = done.stat().st_mtime_ns

    again = run(tmp_path, *short(*sweep), limit=250)
    assert again.code == 1, again.err
    assert "Traceback" not in again.err
    assert done.stat().st_mtime_ns == before
    assert "is finished and is not repeated" in (done.parent / "run.log").read_text()
    assert len(list(tmp_path.glob("sweeps/*/report.json"))) == 2
    logs = [file.read_text() for file in tmp_path.glob("sweeps/*/run.log")]
    assert sum("continuing after step" in text for text in logs) == 1
    rows = table(tmp_path)
    assert [(row["optimizer.lr"], row["seed"]) for row in rows] == [
        ("0.004", "0"),
        ("0.004", "1"),
        ("1e+20", "0"),
        ("1e+20", "1"),
    ]
    assert [bool(row["mistake"]) for row in rows] == [False, False, True, True]
    assert all("training has diverged" in row["mistake"] for row in rows[2:])
    assert float(rows[0]["deviation"]) >= 0
    for row in rows[:2]:
        report = json.loads((tmp_path / row["folder"] / "report.json").read_text())
        assert report["figures"]["val/linear_top1"] == float(row["val/linear_top1"])

    # The good half, started once more, trains nothing.
    third = run(tmp_path, *short("-m", "optimizer.lr=4e-3", "seed=0,1"), limit=60)
    assert third.code == 0, third.err
    assert third.out.count("is finished and is not repeated") == 2
    assert "epoch 1" not in third.out


def test_joblib_runs_are_in_the_table_too(tmp_path):
    sweep = ["-m", "hydra/launcher=joblib", "seed=0,1", "trainer.max_epochs=1", "method.temperature=0.2"]
    result = run(tmp_path, *short(*sweep), limit=250)
    assert result.code == 0, result.err
    assert [row["seed"] for row in table(tmp_path)] == ["0", "1"]
    assert all(row["mean"] for row in table(tmp_path))


def test_a_sweeper_that_is_started_again_proposes_the_same_and_failures_end_in_the_table(tmp_path):
    sweep = ["-m", "hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "hydra.sweeper.n_trials=2"]
    results = [run(tmp_path, *short(*sweep, "backbone.name=nothing"), limit=60) for _ in range(2)]
    assert [result.code for result in results] == [1, 1]
    assert "timm has no such network" in results[0].err
    assert len(list(tmp_path.glob("sweeps/*/run.log"))) == 2
    assert [row["mean"] for row in table(tmp_path)] == ["", ""]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-m", "resume=auto", "seed=0,1"], "a sweep (-m) resumes its unfinished runs by itself"),
        (["trainer.skip_nonfinite=-1"], "trainer.skip_nonfinite=-1: give a whole number, at least 0"),
    ],
)
def test_mistakes(tmp_path, arguments, sentence):
    assert run(tmp_path, *short(*arguments)).refused(sentence)
