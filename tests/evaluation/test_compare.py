"""Comparison of two evaluated runs."""

import json
import shutil

import numpy as np
import pytest
from evaluation.helpers_evaluation import evaluate, quick, relabelled, shuffled
from safetensors.torch import load_file
from short_runs import SIZE

from twoview import runs
from twoview.errors import UserError
from twoview.loading import load


@pytest.fixture(scope="module")
def two_runs(finished, tmp_path_factory):
    """The finished run and random initialization, evaluated by kNN and a linear probe."""
    folder = tmp_path_factory.mktemp("compared")
    short = quick("linear", "knn", "geometry", baselines=False)
    evaluate(folder / "a", finished.folder, settings=short)
    evaluate(folder / "b", load("random:test_resnet", image_size=SIZE, channels=1), settings=short)
    return folder


def test_differences_have_paired_intervals(two_runs, tmp_path):
    report = runs.compare([two_runs / "a", two_runs / "b"], run_dir=tmp_path)
    assert report == json.loads((tmp_path / "report.json").read_text())
    a, b = (load_file(two_runs / name / "predictions.safetensors") for name in "ab")
    found = report["runs"][1]["differences"]["knn"]
    paired = ((b["knn"] == b["labels"]).double() - (a["knn"] == a["labels"]).double()).numpy()
    assert found["difference"] == pytest.approx(paired.mean())
    generator = np.random.default_rng(1)
    means = [paired[generator.integers(0, len(paired), len(paired))].mean() for _ in range(2000)]
    assert found["interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)
    assert report["runs"][0]["differences"]["knn"] == {"difference": 0, "interval": [0, 0]}
    for name in ("report.md", "report.html"):
        assert f"{100 * paired.mean():+.1f}" in (tmp_path / name).read_text()


def test_runs_that_cannot_be_compared_are_refused(two_runs, finished, tmp_path):
    short = quick("knn", baselines=False)
    evaluate(tmp_path / "other", finished.folder, relabelled(shuffled, name="others"), short)
    (tmp_path / "empty").mkdir()
    shutil.copytree(two_runs / "a", tmp_path / "broken")
    (tmp_path / "broken" / "report.json").write_text('{"task": ')
    for given, words in (
        ([two_runs / "a", tmp_path / "other"], "was evaluated on other test images"),
        ([two_runs / "a", tmp_path / "empty"], "no report.json with predictions.safetensors"),
        ([two_runs / "a", tmp_path / "broken"], "cannot be read"),
        ([two_runs / "a"], "give two or more"),
        (str(two_runs / "a"), "give two or more"),
    ):
        with pytest.raises(UserError, match=words):
            runs.compare(given, run_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()
