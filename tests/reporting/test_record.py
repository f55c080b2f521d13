"""``report.json``: what it holds, and its documentation."""

import json
from pathlib import Path

import pytest
from evaluation.helpers_evaluation import full_evaluation

from twoview.reporting import record


@pytest.fixture(scope="module")
def evaluated(finished):
    return full_evaluation(finished.folder)


def test_the_report_is_complete(evaluated):
    report = json.loads((evaluated.folder / "report.json").read_text())
    assert report == evaluated.report
    assert report["schema"] == 3
    assert set(report["results"]) == {"trained", "random initialization", "raw pixels"}
    for name, row in report["results"].items():
        expected = {"linear", "knn", "few_labels", "retrieval", "clustering", "geometry"}
        assert set(row) == expected | ({"invariance", "linear_without_bn"} if name != "raw pixels" else set())
        for probe in {"linear", "linear_without_bn", "knn"} & row.keys():
            low, high = row[probe]["interval"]
            assert 0 <= low <= row[probe]["test_top1"] <= high <= 1
            assert 0 <= row[probe]["balanced_accuracy"] <= 1
        assert set(row["few_labels"]) == {"1 per class", "5 per class", "10 per class", "1 %", "10 %"}
        assert {"participation_ratio", "spectrum_decay"} <= row["geometry"].keys()
    assert report["results"]["trained"]["geometry"]["diagnosis"] == "healthy"
    assert report["integrity"]["shared"] == {"train": {"exact": 0, "near": 0}}
    assert report["classes"] == [str(i) for i in range(10)]
    assert {"command", "commit", "versions", "hardware", "seed", "protocol", "test_fingerprint"} <= set(report)
    for knob, value in json.loads(json.dumps(evaluated.settings.knobs())).items():
        assert report["protocol"][knob] == value


def test_every_key_is_documented(evaluated):
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()

    def keys(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key
                yield from keys(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from keys(inner)

    free = {"trained", "random initialization", "raw pixels", *evaluated.report["versions"]}
    free |= {*evaluated.settings.knobs(), *evaluated.report["backbone"]}
    free |= {"1 per class", "5 per class", "10 per class", "1 %", "10 %"}
    missing = {key for key in keys(evaluated.report) if f"`{key}`" not in text} - free
    assert not {key for key in missing if "@" not in key and not key.startswith("val/")}


def test_figures_that_are_not_finite_are_null(tmp_path):
    written = record.write({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (2, None)}}, tmp_path)
    assert written == {"a": None, "b": [1.5, None], "c": {"d": [2, None]}}
    assert json.loads((tmp_path / "report.json").read_text()) == written
