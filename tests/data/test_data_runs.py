"""Whole runs from each kind of data."""

from functools import partial

import numpy as np
import pytest
import torch
from data.image_files import RNG, load, make_both, make_folder, options, photo
from PIL import Image
from short_runs import pretrain
from torch.utils.data import Dataset

import twoview
from twoview import runs
from twoview.backbones import create_backbone
from twoview.data import from_dataset, parquet
from twoview.errors import UserError
from twoview.evaluation import EvaluationSettings


def run(run_dir, data, channels=3, **measures):
    backbone = partial(create_backbone, "test_resnet", in_chans=channels, image_size=16, stem="small_stride2")
    settings = EvaluationSettings.from_knobs(l2=(1e-2,), k=(1,), **measures)
    return pretrain(run_dir, data=data, backbone=backbone, settings=settings)


@pytest.mark.parametrize("memory", [None, 0])
def test_a_folder_trains_and_is_evaluated(tmp_path, memory):
    make_folder(tmp_path / "images", each=40)
    (tmp_path / "images" / "ant" / "broken.png").write_text("no")
    data = load(tmp_path / "images", memory=memory, batch_size=16, max_broken=0.1)
    report = run(tmp_path / "run", data)
    assert report["results"]["trained"]["linear"]["test_top1"] > 0.8
    assert "broken.png" in (tmp_path / "run" / "broken.txt").read_text()
    encoder = twoview.load(tmp_path / "run")
    assert (encoder.card.store_size, encoder.card.resize_size) == (32, 18)
    with Image.open(data.test.name(0)) as image:
        assert torch.equal(encoder(image), encoder.feature_matrix(data.test.subset(torch.tensor([0]))))


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_channels_end_with_a_probe(tmp_path, channels):
    for i, name in enumerate(("ant", "bee")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for j in range(20):
            noise = RNG.integers(0, 30000, (20, 20, channels)) + 30000 * i
            np.save(tmp_path / "data" / name / f"{j}.npy", noise.astype(np.uint16))
    data = load(tmp_path / "data", channels=channels, batch_size=16)
    report = run(tmp_path / "run", data, channels, baselines=False)
    assert report["results"]["trained"]["linear"]["test_top1"] > 0.8


def test_without_labels_there_is_training_and_no_evaluation(tmp_path):
    for i in range(20):
        photo().save(tmp_path / f"{i}.jpg")
    report = run(tmp_path / "run", lambda: load(tmp_path))
    assert "results" not in report
    assert report["training"]["images_seen"] == 40
    assert "val/effective_rank" in (tmp_path / "run" / "metrics.csv").read_text()
    with pytest.raises(UserError, match="has no labels"):
        runs.linear_probe(tmp_path / "run", lambda **_: load(tmp_path), run_dir=tmp_path / "probe")


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    photo().save(tmp_path / "images" / "1.png")
    with pytest.raises(UserError, match="data: folder has 1 image to learn from"):
        run(tmp_path / "run", lambda: load(tmp_path / "images"))


class Own(Dataset):
    """A user's own Dataset of PIL images and labels."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return Image.new("RGB", (24, 20), (100 * (i % 2), 50, i % 50)), i % 2


def test_a_users_own_dataset(tmp_path):
    data = from_dataset(Own(40), image_size=16, batch_size=16, test=Own(10))
    report = run(tmp_path / "run", lambda: data, baselines=False)
    assert report["results"]["trained"]["knn"]["test_top1"] == 1
    assert "results" not in run(tmp_path / "bare", Own(600))


def test_a_run_from_parquet_that_does_not_fit_in_memory(tmp_path):
    make_both(tmp_path, 60)
    data = parquet(str(tmp_path / "parquet"), memory=0, **options(num_workers=2, batch_size=8))
    report = run(tmp_path / "run", data)
    assert report["training"]["images_seen"] == report["training"]["steps"] * 8
    assert report["results"]["trained"]["knn"]["test_top1"] >= 0
