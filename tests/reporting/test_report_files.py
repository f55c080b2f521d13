"""Files beside the report hold what its figures were computed from."""

import csv
import json

import pytest
from evaluation.helpers_evaluation import full_evaluation
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def evaluated(finished):
    return full_evaluation(finished.folder)


def test_predictions_and_confusion_give_the_accuracies(evaluated):
    predictions = load_file(evaluated.folder / "predictions.safetensors")
    assert set(predictions) == {"labels", "linear", "linear_without_bn", "knn"}
    for probe in ("linear", "linear_without_bn", "knn"):
        right = float((predictions[probe] == predictions["labels"]).double().mean())
        assert right == evaluated.report["results"]["trained"][probe]["test_top1"]
    with (evaluated.folder / "confusion.csv").open() as file:
        rows = list(csv.reader(file))
    assert sum(int(rows[i + 1][i + 1]) for i in range(10)) == (predictions["linear"] == predictions["labels"]).sum()
    assert rows[0] == ["class", *evaluated.report["classes"]]
    assert [row[0] for row in rows[1:]] == evaluated.report["classes"]


def test_the_splits_of_few_labels_are_written(evaluated):
    splits = json.loads((evaluated.folder / "few_labels.json").read_text())
    assert set(splits) == set(evaluated.report["results"]["trained"]["few_labels"])
    assert [len(draw) for draw in splits["5 per class"]] == [50, 50]
