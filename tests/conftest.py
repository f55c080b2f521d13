from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from twoview import runs, schedules
from twoview.augment import TwoViews
from twoview.data import digits
from twoview.evaluate import Protocol, score
from twoview.evaluate.probes import Labelled, predict
from twoview.heads import projection_head
from twoview.methods import SimCLR
from twoview.optim import Optimization

SIZE = 16


def short_data(**changes):
    return digits(**({"image_size": SIZE, "batch_size": 128} | changes))


def pretrain(run_dir, **changes):
    """A run of a few seconds through the plain functions."""
    arguments = {
        "data": short_data,
        "method": partial(SimCLR, temperature=0.2),
        "backbone": {"name": "test_resnet", "in_chans": 1, "image_size": SIZE},
        "head": partial(projection_head, hidden_dim=64, out_dim=32),
        "augment": partial(TwoViews, crop_scale=(0.4, 1.0), flip=0.0, blur=0.0),
        "optimization": Optimization(torch.optim.AdamW, lr=3e-3),
        "schedule": schedules.warmup_cosine,
        "training": runs.Training(max_epochs=2, accelerator="cpu", precision="32-true", log_every=3, check_every=1),
        "protocol": Protocol(l2=(1e-2, 1e-3), k=(1, 5)),
        "loggers": [CSVLogger(run_dir, name="", version="")],
        "run_dir": run_dir,
    }
    return runs.pretrain(**(arguments | changes))


def judge(train, train_labels, test, test_labels, protocol, seed, probes=("linear", "knn")):
    """Predict, then score."""
    classes = 1 + int(max(train_labels.max(), test_labels.max()))
    predictions = predict(Labelled(train, train_labels), test, protocol, seed, probes, classes)
    return {name: score(p, test_labels, classes, protocol, seed) for name, p in predictions.items()}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run: its folder and its report."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    return SimpleNamespace(folder=folder, report=pretrain(folder))
