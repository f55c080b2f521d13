"""Runs of a few seconds through the public functions, and what they leave behind."""

import csv
import os
import signal
from dataclasses import fields, replace
from functools import partial

import torch
from lightning.pytorch.loggers import CSVLogger

from twoview import runs
from twoview.augment import TwoViews
from twoview.backbones import create_backbone
from twoview.data import TensorImages, digits
from twoview.evaluation import EvaluationSettings
from twoview.evaluation.evaluate import take
from twoview.evaluation.measure import Inputs, Labelled
from twoview.heads import projection_head
from twoview.loading import read_checkpoint
from twoview.methods import SimCLR
from twoview.optim import OptimizerSettings
from twoview.training import Recipe, RunSettings, TrainerSettings

SIZE = 12  # below, some digits resemble each other as near duplicates do
RECIPE = Recipe(
    method=partial(SimCLR, temperature=0.2),
    # Without the stride, a run would take twice as long.
    backbone=partial(create_backbone, "test_resnet", in_chans=1, image_size=SIZE, stem="small_stride2"),
    head=partial(projection_head, hidden_dim=64, out_dim=32),
    augment=partial(TwoViews, crop_scale=(0.4, 1.0), flip_p=0.0, blur_p=0.0),
    optimizer=OptimizerSettings(torch.optim.AdamW, lr=3e-3),
)
CPU = TrainerSettings(max_epochs=2, accelerator="cpu", precision="32-true", log_every=3, check_every=1)
SETTINGS = EvaluationSettings.from_knobs(l2=(1.0, 0.1), k=(1, 5))


def short_data(image_size=SIZE, channels=1, batch_size=128):
    """Digits of 12 pixels."""
    return digits(image_size, channels, batch_size)


def pretrain(run_dir, data=short_data, trainer=CPU, settings=SETTINGS, **changes):
    """A run of a few seconds; ``changes`` are fields of Recipe and of RunSettings."""
    of_recipe = {field.name: changes.pop(field.name) for field in fields(Recipe) if field.name in changes}
    run = RunSettings(**({"run_dir": run_dir, "loggers": [CSVLogger(run_dir, name="", version="")]} | changes))
    return runs.pretrain(data, replace(RECIPE, **of_recipe), trainer, settings, run)


class StopsAfter(CSVLogger):
    """A logger that sends this process a signal after some step."""

    def __init__(self, folder, after=None, number=signal.SIGUSR1):
        super().__init__(folder, name="", version="")
        self.after, self.number = after, number

    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)
        if self.after is not None and step == self.after:
            self.after = None
            os.kill(os.getpid(), self.number)


def make_inputs(train, train_labels, test, classes=None, seed=0, **changes):
    """Inputs of measures that need features and labels only; ``changes`` are other fields of Inputs."""
    nothing = TensorImages(torch.zeros(len(test), 1, 1, 1, dtype=torch.uint8), torch.full((len(test),), -1))
    defaults = {
        "name": "trained",
        "encoder": None,
        "train": Labelled(train, train_labels),
        "test": test,
        "train_images": TensorImages(torch.zeros(len(train), 1, 1, 1, dtype=torch.uint8), train_labels),
        "test_images": nothing,
        "pretrain_images": None,
        "views": None,
        "thumbnails": {},
        "classes": classes or 1 + int(train_labels.max()),
        "holdout": 0.2,
        "bootstrap": 2000,
        "seed": seed,
        "split_seed": seed,
        "device": torch.device("cpu"),
        "batch_size": 512,
    }
    return Inputs(**(defaults | changes))


def take_measures(train, train_labels, test, test_labels, settings, seed=0, **changes):
    """Choose, then score: the figures of each measure of the settings, by its name."""
    classes = 1 + int(max(train_labels.max(), test_labels.max()))
    shared = {"holdout": settings.holdout, "bootstrap": settings.bootstrap}
    inputs = make_inputs(train, train_labels, test, classes, seed, **(shared | changes))
    return take(settings.measures, inputs, test_labels)[0]


def logged(run_dir):
    """Rows of ``metrics.csv``."""
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def training_rows(run_dir):
    """Rows of ``metrics.csv`` with a loss."""
    return [row for row in logged(run_dir) if row["train/loss"]]


def losses(run_dir):
    """Logged losses, to the last digit."""
    return [row["train/loss"] for row in training_rows(run_dir)]


def learning_rates(run_dir):
    """Logged learning rates."""
    return [float(row["train/lr"]) for row in training_rows(run_dir)]


def assert_same(run_dir, other):
    """Two runs ended with equal weights, buffers and optimizer states, and logged the same."""
    one, two = (read_checkpoint(f) for f in (run_dir, other))
    assert one["global_step"] == two["global_step"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    moments, others = (c["optimizer_states"][0]["state"] for c in (one, two))
    assert moments.keys() == others.keys()
    for key, state in moments.items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(others[key][name])) for name, v in state.items())
    if (run_dir / "metrics.csv").exists():
        columns = ("step", "train/loss", "train/lr")
        ours, theirs = ([[row[name] for name in columns] for row in training_rows(f)] for f in (run_dir, other))
        assert ours == theirs
