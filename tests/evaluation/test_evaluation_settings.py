"""Settings of evaluations and their flat form."""

import importlib.util
from dataclasses import fields

import pytest

from twoview.errors import UserError
from twoview.evaluation.few_labels import FewLabels
from twoview.evaluation.geometry import Geometry
from twoview.evaluation.invariance import Invariance
from twoview.evaluation.knn import KNN
from twoview.evaluation.linear import Linear
from twoview.evaluation.retrieval import Retrieval
from twoview.evaluation.settings import MEASURES, EvaluationSettings

OUT_OF_RANGE = [
    {"holdout": 1.0},
    {"l2": ()},
    {"k": (0,)},
    {"temperature": (-1,)},
    {"parts": ("linaer",)},
    {"parts": ()},
    {"class_weights": "even"},
    {"retrieval": "all"},
    {"label_smoothing": 1.0},
    {"label_shares": (1.5,)},
    {"draws": 1},
    {"bootstrap": 10},
    {"sgd_epochs": 0},
    {"few_label_l2": 0.0},
    {"max_iterations": 0},
    {"shift_images": 1},
    {"ranks": (0,)},
    {"map": "tsne"},
]


@pytest.mark.parametrize("knobs", OUT_OF_RANGE, ids=lambda knobs: next(iter(knobs)))
def test_values_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=f"eval.{next(iter(knobs))}="):
        EvaluationSettings.from_knobs(**({"parts": list(MEASURES)} | knobs))


def test_a_projection_that_is_not_installed_is_refused():
    if importlib.util.find_spec("umap"):
        assert EvaluationSettings(map="umap").map == "umap"
        return
    with pytest.raises(UserError, match="eval.map=umap"):
        EvaluationSettings(map="umap")


def test_a_knob_is_set_in_every_measure_that_has_it():
    knobs = {"max_iterations": 7, "class_weights": "balanced", "shift_images": 8, "l2": (0.5,)}
    settings = EvaluationSettings.from_knobs(parts=list(MEASURES), **knobs)
    assert [measure.name for measure in settings.measures] == list(MEASURES)
    for knob, value in knobs.items():
        having = [m for m in settings.measures if knob in {field.name for field in fields(m)}]
        assert len(having) > 1, knob
        assert all(getattr(measure, knob) == value for measure in having)
    found = {measure.name: measure for measure in settings.measures}
    assert found["linear"] == Linear((0.5,), 7, class_weights="balanced")
    assert found["linear_without_bn"] == Linear((0.5,), 7, class_weights="balanced", batch_norm=False)
    assert found["knn"] == KNN(class_weights="balanced")
    assert found["few_labels"] == FewLabels(max_iterations=7)
    assert (found["geometry"], found["invariance"]) == (Geometry(8), Invariance(8))
    assert found["retrieval"] == Retrieval()


def test_a_knob_of_a_measure_that_is_not_taken_changes_nothing():
    assert EvaluationSettings.from_knobs(parts=["knn"], l2=[0.1]) == EvaluationSettings((KNN(),))


def test_the_defaults_are_those_of_the_flat_form():
    assert EvaluationSettings.from_knobs() == EvaluationSettings()
    assert [measure.name for measure in EvaluationSettings().measures] == ["linear", "knn", "geometry"]


@pytest.mark.parametrize(
    "settings",
    [
        EvaluationSettings(),
        EvaluationSettings.from_knobs(
            parts=list(MEASURES), max_iterations=9, shift_images=5, cache="x", baselines=False
        ),
        EvaluationSettings((Linear((0.1,), batch_norm=False), Retrieval("gallery", (3,))), 0.3, 500),
    ],
)
def test_the_flat_form_gives_the_same_settings(settings):
    knobs = settings.knobs()
    assert EvaluationSettings.from_knobs(**knobs) == settings
    assert all(not field.name.startswith("_") for field in fields(settings))
    assert {"parts", "holdout", "bootstrap", "map", "baselines", "cache"} <= knobs.keys()
    assert "batch_norm" not in knobs


def test_measures_are_taken_in_the_order_of_the_report():
    settings = EvaluationSettings.from_knobs(parts=["geometry", "linear"])
    assert [measure.name for measure in settings.measures] == ["linear", "geometry"]


def test_only_keeps_the_knobs_of_what_it_keeps():
    settings = EvaluationSettings.from_knobs(k=(3,), holdout=0.3)
    assert settings.only("knn") == EvaluationSettings((KNN((3,)),), 0.3)
    assert settings.only("retrieval", "knn").measures == (KNN((3,)),)
    assert settings.only("retrieval").measures == (Retrieval(),)
