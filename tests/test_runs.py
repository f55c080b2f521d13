"""The public functions."""

import json
from dataclasses import FrozenInstanceError, replace
from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from short_runs import CPU, SETTINGS, SIZE, losses, make_inputs, pretrain, short_data

import twoview
from twoview import runs
from twoview.augment import TwoViews
from twoview.data import digits, split_holdout
from twoview.errors import UserError
from twoview.evaluation import EvaluationSettings
from twoview.evaluation.evaluate import take
from twoview.loading import read_checkpoint
from twoview.methods import SimCLR
from twoview.optim import OptimizerSettings
from twoview.training import Recipe, RunSettings, TrainerSettings


def test_a_run_trains_and_reports(finished):
    report = json.loads((finished.folder / "report.json").read_text())
    assert report == finished.report
    assert report["training"]["steps"] == 2 * (1347 // 128)
    assert report["training"]["images_seen"] == 20 * 128
    assert set(report["results"]) == {"trained", "random initialization", "raw pixels"}
    assert report["results"]["trained"]["geometry"]["diagnosis"] == "healthy"
    for row in report["results"].values():
        assert 0.3 < row["linear"]["test_top1"] <= 1
        assert 0.3 < row["knn"]["test_top1"] <= 1
    assert report["figures"]["val/linear_top1"] == report["results"]["trained"]["linear"]["val_top1"]
    for key in ("seed", "protocol", "versions", "commit", "hardware", "command"):
        assert key in report


def test_probing_a_checkpoint_gives_the_figures_of_the_run(finished, tmp_path):
    for name, task in (("linear", runs.linear_probe), ("knn", runs.knn)):
        report = task(finished.folder, short_data, SETTINGS, run_dir=tmp_path / name)
        assert report["results"]["trained"] == {name: finished.report["results"]["trained"][name]}
        assert report["results"]["random initialization"] == {
            name: finished.report["results"]["random initialization"][name]
        }
        assert json.loads((tmp_path / name / "report.json").read_text()) == report


def test_an_encoder_is_evaluated_as_its_checkpoint_is(finished, tmp_path):
    encoder = twoview.load(finished.folder)
    report = runs.knn(encoder, short_data, SETTINGS, run_dir=tmp_path)
    assert report["results"]["trained"]["knn"] == finished.report["results"]["trained"]["knn"]
    assert report["checkpoint"] == str(finished.folder / "checkpoints" / "last.ckpt")


def test_the_evaluation_does_not_change_the_backbone(finished):
    before = read_checkpoint(finished.folder)["state_dict"]
    encoder, data = twoview.load(finished.folder), short_data()
    train, test = (encoder.feature_matrix(split) for split in (data.train, data.test))
    inputs = make_inputs(train, data.train.labels, test, 10, encoder=encoder, train_images=data.train)
    take(EvaluationSettings.from_knobs(parts=["linear", "knn"], l2=(1e-2,)).measures, inputs, data.test.labels)
    for key, value in encoder.network.state_dict().items():
        assert torch.equal(value, before["method.backbone." + key]), key


def test_the_same_seed_repeats_to_the_last_digit_and_another_does_not(finished, tmp_path):
    pretrain(tmp_path / "again", settings=None)
    pretrain(tmp_path / "other", settings=None, seed=1)
    assert losses(tmp_path / "again") == losses(finished.folder)
    assert losses(tmp_path / "other") != losses(finished.folder)


def test_shuffled_test_labels_change_nothing_but_the_final_test_figures(finished, tmp_path):
    def shuffled():
        data = short_data()
        data.test.labels = data.test.labels[torch.randperm(450, generator=torch.Generator().manual_seed(0))]
        return data

    report = pretrain(tmp_path, data=shuffled)
    assert losses(tmp_path) == losses(finished.folder)
    for name, row in report["results"].items():
        expected = finished.report["results"][name]
        assert row["geometry"] == expected["geometry"]
        for probe in ("linear", "knn"):
            assert row[probe]["test_top1"] < 0.3 < expected[probe]["test_top1"]
            for choice in {"val_top1", "l2", "converged", "k", "temperature"} & expected[probe].keys():
                assert row[probe][choice] == expected[probe][choice]


@pytest.mark.parametrize("batch_size", [1, 0, 1348])
def test_impossible_batch_sizes_are_refused(tmp_path, batch_size):
    with pytest.raises(UserError, match=f"data.batch_size={batch_size}: digits has 1347 images"):
        pretrain(tmp_path, data=partial(short_data, batch_size=batch_size))


def test_images_that_do_not_fit_the_backbone_are_refused(tmp_path):
    with pytest.raises(UserError, match="images of 1x24x24 do not fit"):
        pretrain(tmp_path, data=partial(short_data, image_size=24))


def test_the_probe_takes_sizes_from_the_checkpoint_and_refuses_others(finished, tmp_path):
    for knob in ({"image_size": 24}, {"channels": 3}):
        with pytest.raises(UserError, match=f"data.{next(iter(knob))}=.*: the checkpoint was made for"):
            twoview.load(finished.folder, **knob)
    with pytest.raises(UserError, match="digits has 3 channels, the checkpoint needs 1"):
        runs.linear_probe(finished.folder, digits(image_size=SIZE, channels=3), run_dir=tmp_path)


def test_a_preview_is_an_image_of_all_views(tmp_path):
    path = runs.preview(short_data, partial(TwoViews, blur_p=0.0), images=5, pairs=2, run_dir=tmp_path)
    with Image.open(path) as image:
        assert image.size == (5 * SIZE, 5 * SIZE)


@pytest.mark.parametrize("knob", ["images", "pairs"])
def test_an_empty_preview_is_refused(tmp_path, knob):
    with pytest.raises(UserError, match=f"{knob}=0: must be at least 1"):
        runs.preview(short_data, run_dir=tmp_path, **{knob: 0})


def test_held_out_labels_are_hidden_from_pretraining(tmp_path):
    seen = {}

    class Looks(SimCLR):
        def loss(self, encoded, ids=None, labels=None):
            seen.update(zip(ids.tolist(), labels.tolist(), strict=True))
            return super().loss(encoded, ids, labels)

    pretrain(tmp_path, method=Looks, trainer=replace(CPU, max_epochs=3), settings=None)
    images = digits(image_size=SIZE)
    held_out = set(split_holdout(images.train.labels, 0.2, 0)[1].tolist())
    assert len(seen) > 1300
    assert all((label == -1) == (i in held_out) for i, label in seen.items())
    assert all(label == images.train.labels[i] for i, label in seen.items() if i not in held_out)


def test_run_settings_write_to_one_folder_and_resume_nothing_by_default():
    run = RunSettings()
    assert (run.run_dir, run.seed, tuple(run.loggers), run.identity) == ("run", 0, (), None)
    assert (run.resume, run.exact, run.rerun) == (None, True, False)
    with pytest.raises(FrozenInstanceError):
        run.seed = 1


def test_the_default_recipe_trains(tmp_path):
    recipe = Recipe()
    assert (recipe.method, recipe.augment, recipe.optimizer) == (SimCLR, TwoViews, OptimizerSettings())
    data = digits(image_size=32, channels=3)
    data.pretrain = data.pretrain.subset(torch.arange(256))
    run = RunSettings(run_dir=tmp_path)
    report = runs.pretrain(data, None, TrainerSettings(max_steps=1, accelerator="cpu"), None, run)
    assert (report["method"], report["seed"]) == ("SimCLR", 0)
    assert report["backbone"]["options"]["layers"] == [1, 1, 1, 1]  # resnet10_narrow
    assert report["training"]["steps"] == 1


def test_loggers_may_have_names(tmp_path):
    loggers = {"csv": CSVLogger(tmp_path, name="", version="")}
    pretrain(tmp_path, loggers=loggers, settings=None, trainer=replace(CPU, max_epochs=1))
    assert losses(tmp_path)
