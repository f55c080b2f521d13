"""Evaluations of networks from every source, on ordinary and unusual images."""

import re
from functools import partial

import pytest
import torch
from evaluation.helpers_evaluation import digits_data, evaluate, full_evaluation, quick, relabelled, shuffled
from safetensors.torch import load_file
from short_runs import SIZE, short_data

import twoview
from twoview import runs
from twoview.backbones import build_arguments, create_backbone
from twoview.data import ImageData, TensorImages
from twoview.errors import UserError
from twoview.evaluation.settings import EvaluationSettings
from twoview.loading import load


@pytest.fixture(scope="module")
def evaluated(finished):
    return full_evaluation(finished.folder)


def test_shuffled_test_labels_change_no_choice(evaluated, finished, tmp_path):
    parts = [part for part in quick().knobs()["parts"] if part not in ("invariance", "integrity")]
    wrong = evaluate(tmp_path, finished.folder, relabelled(shuffled), quick(*parts, baselines=False))
    right, found = evaluated.report["results"]["trained"], wrong["results"]["trained"]
    for probe in ("linear", "linear_without_bn", "knn"):
        for choice in {"val_top1", "l2", "k", "temperature", "converged"} & right[probe].keys():
            assert found[probe][choice] == right[probe][choice]
        assert found[probe]["test_top1"] < 0.3
    assert wrong["figures"] == evaluated.report["figures"]
    ours, theirs = (load_file(folder / "predictions.safetensors") for folder in (evaluated.folder, tmp_path))
    assert all(torch.equal(ours[probe], theirs[probe]) for probe in ours if probe != "labels")
    without_labels = ("spectrum", "effective_rank", "alignment", "uniformity", "spectrum_decay")
    assert all(found["geometry"][name] == right["geometry"][name] for name in without_labels)


def test_images_of_pretraining_are_compared_too(finished, tmp_path):
    data = short_data()
    pixels = torch.cat([data.train.pixels, data.test.pixels[:5]])
    pretrain = TensorImages(pixels, torch.cat([data.train.labels, torch.full((5,), -1)]))
    leaky = ImageData(pretrain, data.train, data.test, data.classes, 128)
    report = evaluate(tmp_path, finished.folder, leaky, quick("knn", "integrity", baselines=False))
    assert report["integrity"]["shared"]["pretrain"] == {"exact": 5, "near": 0}


def test_a_test_set_of_one_class(finished, tmp_path):
    data = short_data()
    one = data.test.subset(torch.nonzero(data.test.labels == 3).flatten())
    images = ImageData(data.train, data.train, one, data.classes, 128)
    report = evaluate(tmp_path, finished.folder, images, quick(baselines=False))
    row = report["results"]["trained"]
    assert row["linear"]["balanced_accuracy"] == pytest.approx(row["linear"]["test_top1"])
    assert row["retrieval"]["mean_average_precision"] == 1
    assert row["linear"]["per_class"].count(None) == 9


def test_data_of_one_class(finished, tmp_path):
    data = short_data()
    train, test = (x.with_labels(torch.zeros(len(x), dtype=torch.long)) for x in (data.train, data.test))
    images = ImageData(train, train, test, ["all\udcff\x01"], 128)
    report = evaluate(tmp_path, finished.folder, images, quick(baselines=False))
    assert report["results"]["trained"]["linear"]["test_top1"] == 1
    assert (tmp_path / "report.html").exists()


def test_rotated_images_are_not_taken_from_the_cache(evaluated, finished, tmp_path):
    data = short_data()
    rotated = TensorImages(data.test.pixels.rot90(2, (2, 3)).contiguous(), data.test.labels)
    assert data.test.statistics()[:, :2].sum() == pytest.approx(float(rotated.statistics()[:, :2].sum()))
    settings = quick("knn", baselines=False, cache=evaluated.settings.cache)
    images = ImageData(data.train, data.train, rotated, data.classes, 128)
    report = evaluate(tmp_path, finished.folder, images, settings)
    assert report["results"]["trained"]["knn"]["test_top1"] < 0.7
    assert report["test_fingerprint"] != evaluated.report["test_fingerprint"]


def test_the_baseline_of_a_network_with_loaded_weights_has_its_architecture(tmp_path):
    network, _ = create_backbone("test_vit", 3, 32, stem="timm")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    loaded, _ = create_backbone("test_vit", 3, 32, weights=tmp_path / "weights.pt")
    again, _ = create_backbone(**build_arguments(loaded))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in loaded.state_dict().items()}
    smaller, _ = create_backbone("test_vit", 3, 32)
    assert smaller.patch_embed.patch_size != loaded.patch_embed.patch_size


def test_a_checkpoint_of_another_architecture_is_refused(finished, tmp_path):
    content = torch.load(finished.folder / "checkpoints" / "last.ckpt", weights_only=True)
    content["twoview"]["backbone"] |= {"name": "test_efficientnet", "stem": "timm"}
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="its weights do not fit this timm's test_efficientnet"):
        evaluate(tmp_path / "run", tmp_path / "other.ckpt")
    assert not (tmp_path / "run").exists()


def test_features_that_are_not_finite_are_refused(finished, tmp_path):
    content = torch.load(finished.folder / "checkpoints" / "last.ckpt", weights_only=True)
    name = next(k for k in content["state_dict"] if k.startswith("method.backbone.") and k.endswith("weight"))
    content["state_dict"][name][0] = float("nan")
    torch.save(content, tmp_path / "diverged.ckpt")
    with pytest.raises(UserError, match="450 of 450|1347 of 1347 images have features that are not finite"):
        evaluate(tmp_path / "run", tmp_path / "diverged.ckpt")


def test_timm_and_random_networks(tmp_path):
    network, _ = create_backbone("test_resnet", 1, SIZE, stem="timm")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    short = quick("knn", "geometry", baselines=False)
    encoder = twoview.load("timm:test_resnet", SIZE, 1, weights=tmp_path / "weights.pt")
    report = evaluate(tmp_path / "a", encoder, settings=short)
    assert report["method"] == "timm test_resnet"
    assert report["backbone"]["stem"] == "timm"
    # A source is built for the images that are given.
    first, again = (evaluate(tmp_path / name, "random:test_resnet", digits_data(), short) for name in "bc")
    assert first["results"] == again["results"]
    assert first["method"] == "random test_resnet"
    # The network as its own baseline: two columns with the same figures.
    report = evaluate(tmp_path / "d", "random:test_resnet", digits_data(), quick("knn", "geometry"))
    assert report["results"]["trained"] == report["results"]["random initialization"]
    assert "| random test\\_resnet | random initialization | raw pixels |" in (tmp_path / "d" / "report.md").read_text()


@pytest.mark.parametrize(
    ("checkpoint", "weights", "words"),
    [
        ("timm:resnet19", None, "checkpoint=timm:resnet19: timm has no published weights of that name; did you mean"),
        ("timm:test_resnet", "missing.pt", "weights=missing.pt: there is no such file"),
        ("random:resnet10", None, "give data.image_size=N"),
        ("runs/none", None, "checkpoint=runs/none: there is no checkpoint"),
        ("runs/none", "w.pt", "weights=w.pt: goes with checkpoint=timm:NAME"),
    ],
)
def test_sources_without_a_network_are_refused_in_one_sentence(checkpoint, weights, words, tmp_path):
    with pytest.raises(UserError, match=re.escape(words)):
        evaluate(tmp_path / "run", checkpoint if weights is None else load(checkpoint, weights=weights))
    assert not (tmp_path / "run").exists()


def test_linear_probe_and_knn_measure_nothing_else(finished, tmp_path):
    few = partial(EvaluationSettings.from_knobs, l2=(1e-2,), baselines=False, sgd_epochs=1)
    report = runs.linear_probe(finished.folder, digits_data, few(), run_dir=tmp_path)
    assert set(report["results"]["trained"]) == {"linear"}
    report = runs.linear_probe(finished.folder, digits_data, few(parts=("linear_sgd",)), run_dir=tmp_path / "sgd")
    assert set(report["results"]["trained"]) == {"linear_sgd"}
    assert set(runs.knn(finished.folder, digits_data, few(), run_dir=tmp_path)["results"]["trained"]) == {"knn"}
