"""The interface of measures: choices see no test label, and a new measure needs no change elsewhere."""

import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
from evaluation.helpers_evaluation import blobs, shuffled
from short_runs import SIZE, make_inputs, short_data, take_measures
from torch import Tensor

from twoview import runs
from twoview.augment import TwoViews
from twoview.data import ImageData, in_order
from twoview.evaluation.clustering import Clustering
from twoview.evaluation.evaluate import evaluate
from twoview.evaluation.knn import KNN
from twoview.evaluation.linear import Linear
from twoview.evaluation.measure import Inputs, Measure
from twoview.evaluation.settings import MEASURES, EvaluationSettings
from twoview.evaluation.tables import Table
from twoview.loading import load


def tensors(value, seen=None):
    """All tensors in dataclasses, tuples, lists and mappings, also in attributes of images and modules."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name), seen)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from tensors(inner, seen)
    elif isinstance(value, dict) or hasattr(value, "__dict__"):
        for inner in (value if isinstance(value, dict) else vars(value)).values():
            yield from tensors(inner, seen)


@dataclass(frozen=True)
class Nearest(Measure):
    """A new measure: accuracy of the nearest class mean."""

    name = "nearest_mean"

    power: float = 2.0

    def choose(self, inputs: Inputs, earlier: Any) -> Tensor:
        assert len(inputs.test_images) == len(inputs.test)
        assert (inputs.test_images.labels == -1).all()
        assert all((batch.labels == -1).all() for batch in in_order(inputs.test_images))
        features, labels = inputs.train
        means = torch.stack([features[labels == c].mean(0) for c in range(inputs.classes)])
        return torch.cdist(inputs.test, means, p=self.power).argmin(1)

    def score(self, chosen: Tensor, inputs: Inputs, labels: Tensor) -> dict[str, Any]:
        return {"right": int((chosen == labels).sum()), "of": len(labels)}

    def table(self, columns: Any, report: Any) -> Table:
        rows = [[name, f"{figures['right']} of {figures['of']}"] for name, figures in columns.items()]
        return Table("Nearest class means", ["network", "right"], rows, f"{len(report['classes'])} classes")


@dataclass(frozen=True)
class Recorded(Measure):
    """Another measure, whose calls are recorded, and which is refused inputs that hold a test label."""

    inner: Measure
    calls: Any
    test_labels: Any

    @property
    def name(self) -> str:
        return self.inner.name

    def applies(self, inputs: Inputs) -> bool:
        return self.inner.applies(inputs)

    def choose(self, inputs: Inputs, earlier: Any) -> Any:
        self.calls.append(("choose", inputs.name, self.name))
        assert (inputs.test_images.labels == -1).all()
        assert not any(torch.equal(x.flatten(), self.test_labels) for x in tensors(inputs) if x.dtype == torch.int64)
        return self.inner.choose(inputs, earlier)

    def score(self, chosen: Any, inputs: Inputs, labels: Tensor) -> dict[str, Any]:
        self.calls.append(("score", inputs.name, self.name))
        assert torch.equal(labels, self.test_labels)
        return self.inner.score(chosen, inputs, labels)


def few_digits():
    """300 training and 100 test images."""
    data = short_data()
    train, test = data.train.subset(torch.arange(300)), data.test.subset(torch.arange(100))
    return ImageData(train, train, test, data.classes, 128, "digits", allow_flip=False, min_crop_area=0.3)


@pytest.fixture(scope="module")
def encoder():
    return load("random:test_resnet", image_size=SIZE, channels=1)


def test_every_measure_chooses_without_test_labels_before_any_score(encoder):
    data, calls = few_digits(), []
    small = {"k": [5], "l2": [0.01], "sgd_lr": [1.0], "sgd_epochs": 1, "shift_images": 20, "draws": 2, "bootstrap": 100}
    every = EvaluationSettings.from_knobs(parts=list(MEASURES), **small)
    recorded = tuple(Recorded(measure, calls, data.test.labels) for measure in every.measures)
    settings, views = EvaluationSettings(recorded, bootstrap=100), TwoViews(**data.view_limits())
    report, _ = evaluate(encoder, data, views, settings, seed=0)
    assert set(report["results"]) == {"trained", "random initialization", "raw pixels"}
    for name in report["results"]:
        order = [call for call in calls if call[1] == name]
        chosen, scored = ([what for phase, _, what in order if phase == p] for p in ("choose", "score"))
        left_out = {"trained": set(), "random initialization": {"integrity"}}
        left_out = left_out.get(name, {"integrity", "invariance", "linear_sgd", "linear_without_bn"})
        assert chosen == [measure for measure in MEASURES if measure not in left_out]
        assert scored == [measure for measure in chosen if not MEASURES[measure].probe_title]  # probes need no score()
        assert [phase for phase, _, _ in order] == ["choose"] * len(chosen) + ["score"] * len(scored)


def test_the_search_for_tensors_finds_labels(encoder):
    data = few_digits()
    inputs = make_inputs(torch.ones(4, 2), torch.arange(4), torch.ones(100, 2), test_images=data.test)
    assert any(x is data.test.labels for x in tensors(inputs))


@pytest.mark.parametrize("measure", [Linear(), Linear(batch_norm=False), KNN(), Clustering()])
def test_shuffled_test_labels_change_test_figures_only(measure):
    train, (test, labels) = blobs(), blobs(seed=1)
    settings = EvaluationSettings((measure,))
    right, wrong = (take_measures(*train, test, y, settings)[measure.name] for y in (labels, shuffled(labels)))
    if measure.name == "clustering":
        assert (right["silhouette"], right["clusters"]) == (wrong["silhouette"], wrong["clusters"])
        assert right["nmi"] > wrong["nmi"] + 0.3
        return
    assert right["test_top1"] > 0.8
    assert wrong["test_top1"] < 0.5
    for choice in {"val_top1", "l2", "converged", "k", "temperature"} & right.keys():
        assert right[choice] == wrong[choice]


def test_a_new_measure_is_reported(encoder, tmp_path):
    data = few_digits()
    settings = EvaluationSettings((KNN(k=(5,)), Nearest(power=1.0)), bootstrap=100)
    report = runs.evaluate(encoder, data, settings, run_dir=tmp_path)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert {name: set(row) for name, row in report["results"].items()} == {
        name: {"knn", "nearest_mean"} for name in ("trained", "random initialization", "raw pixels")
    }
    assert report["protocol"]["parts"] == ["knn", "nearest_mean"]
    assert report["protocol"]["power"] == 1.0
    means = torch.stack([data.train.pixels[data.train.labels == c].float().mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(data.test.pixels.flatten(1).float(), means, p=1.0).argmin(1)
    assert report["results"]["raw pixels"]["nearest_mean"]["right"] == int((nearest == data.test.labels).sum())


def test_the_table_of_a_new_measure_is_shown(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(MEASURES, "nearest_mean", Nearest())
    settings = EvaluationSettings.from_knobs(parts=["knn", "nearest_mean"], k=[5], power=3.0, bootstrap=100)
    assert settings.measures[1] == Nearest(power=3.0)
    report = runs.evaluate(encoder, few_digits(), settings, run_dir=tmp_path)
    right = report["results"]["trained"]["nearest_mean"]["right"]
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "Nearest class means" in text
        assert f"{right} of 100" in text
        assert "10 classes" in text
