"""Choices are made on labels that pretraining has not seen, whatever the seed of the evaluation."""

from functools import partial

import pytest
import torch

from twoview import load
from twoview.augment import TwoViews
from twoview.backbones import create_backbone
from twoview.data import ImageData, TensorImages, fit_size
from twoview.evaluation import EvaluationSettings
from twoview.heads import projection_head
from twoview.methods import SimCLR, SupCon
from twoview.optim import OptimizerSettings
from twoview.runs import evaluate, pretrain
from twoview.training import Recipe, RunSettings, TrainerSettings

QUICK = EvaluationSettings.from_knobs(parts=["linear", "knn"], baselines=False, bootstrap=100)
CLASSES = 5  # chance is 0.2


def images(seed=0):
    """200 images of smooth noise with random labels, which no probe can predict unless they were seen."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (200, 3, 4, 4), generator=generator, dtype=torch.uint8)
    pixels = fit_size(noise, 16)
    split = TensorImages(pixels, torch.randint(0, CLASSES, (200,), generator=generator))
    return ImageData(split, split, split.subset(torch.arange(20)), list("abcde"), batch_size=100)


@pytest.fixture(scope="module")
def memorized(tmp_path_factory):
    """A backbone that has memorized the labels it was given."""
    folder = tmp_path_factory.mktemp("memorized")
    recipe = Recipe(
        method=SupCon,
        backbone=partial(create_backbone, "resnet10_narrow", image_size=16),
        head=partial(projection_head, out_dim=32),
        augment=partial(TwoViews, crop_scale=(0.9, 1.0), flip_p=0.0, jitter_p=0.0, gray_p=0.0, blur_p=0.0),
        optimizer=OptimizerSettings(lr=3e-3),
    )
    trainer = TrainerSettings(max_epochs=80, accelerator="cpu", precision="32-true", check_every=0)
    pretrain(images(), recipe, trainer, None, RunSettings(run_dir=folder))
    return load(folder)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_held_out_accuracy_is_at_chance_for_every_seed(tmp_path, memorized, seed):
    report = evaluate(memorized, images(), QUICK, seed=seed, run_dir=tmp_path)
    found = [report["results"]["trained"][probe]["val_top1"] for probe in ("linear", "knn")]
    # Of 40 held-out images, 18 or more are right by chance with a probability of 2e-4.
    assert max(found) < 0.45
    assert "warnings" not in report


@pytest.mark.parametrize(
    ("data", "holdout"), [(images(), 0.3), (images(1), 0.2)], ids=["another share", "other images"]
)
def test_the_report_says_where_choices_are_not_on_unseen_labels(tmp_path, memorized, data, holdout):
    settings = EvaluationSettings.from_knobs(parts=["knn"], baselines=False, bootstrap=100, holdout=holdout)
    report = evaluate(memorized, data, settings, run_dir=tmp_path)
    assert len(report["warnings"]) == 1
    assert "SupCon" in report["warnings"][0]


def test_methods_without_labels_keep_the_seed_of_the_evaluation():
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    head = projection_head(4, out_dim=4)
    assert [SimCLR(backbone, head, same=same).uses_labels for same in ("none", "labels")] == [False, True]
