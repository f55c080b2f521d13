"""Cached features and baselines."""

import shutil

import pytest
from evaluation.helpers_evaluation import evaluate, full_evaluation, quick, with_cache


@pytest.fixture(scope="module")
def evaluated(finished):
    return full_evaluation(finished.folder)


def test_a_second_evaluation_takes_features_and_baselines_from_the_cache(evaluated, finished, tmp_path, caplog):
    caplog.set_level("INFO")
    again = evaluate(tmp_path, finished.folder, settings=evaluated.settings)
    assert caplog.text.count("taken from the cache") == 4  # features of both splits, two baselines
    assert again["results"] == evaluated.report["results"]


def test_damaged_files_are_computed_again(evaluated, finished, tmp_path, caplog):
    shutil.copytree(evaluated.settings.cache, tmp_path / "cache")
    for number, file in enumerate(sorted((tmp_path / "cache").iterdir())):
        file.write_bytes(file.read_bytes()[: 100 * number])
    again = evaluate(tmp_path / "run", finished.folder, settings=with_cache(evaluated.settings, tmp_path / "cache"))
    assert caplog.text.count("computing it again") >= 4
    assert again["results"] == evaluated.report["results"]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_logged_and_ignored(finished, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    settings = quick("knn", cache=str(tmp_path / "file"), baselines=False)
    assert "knn" in evaluate(tmp_path / "run", finished.folder, settings=settings)["results"]["trained"]
    assert "cannot be written" in caplog.text
