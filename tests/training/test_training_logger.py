"""What is logged during training, and the warning of collapse."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from short_runs import CPU, SIZE, logged, pretrain, short_data, training_rows
from torch import nn

import twoview
from twoview.data import digits
from twoview.loading import read_checkpoint
from twoview.methods import MoCo, SimCLR


def test_everything_promised_is_logged(finished):
    columns = logged(finished.folder)[0].keys()
    names = """
        loss chance contrastive_top1 positive_similarity negative_similarity alignment uniformity
        feature_std embedding_std lr images_per_second time_load time_augment time_train
    """
    for name in names.split():
        assert f"train/{name}" in columns
    assert {"val/knn_top1", "val/effective_rank", "val/effective_rank_rows"} <= columns
    row = training_rows(finished.folder)[0]
    shares = [float(row[f"train/time_{part}"]) for part in ("load", "augment", "train")]
    assert sum(shares) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in shares)
    assert float(row["train/chance"]) == pytest.approx(math.log(2 * 128 - 1))


def test_a_healthy_run_does_not_warn(tmp_path, caplog):
    pretrain(tmp_path, settings=None)
    assert "collapsing" not in caplog.text


def test_collapse_is_warned_of_once(tmp_path, caplog):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.bias + 0 * x[:, :8]

    pretrain(tmp_path, head=lambda width: Constant(), settings=None)
    assert caplog.text.count("Collapse: nearly the same features for all images") == 1


def test_a_collapsed_backbone_is_detected_behind_the_batchnorm_of_the_head(tmp_path, caplog):
    class Collapsed(SimCLR):
        """A backbone whose features differ by a thousandth, which the head's BatchNorm scales up again."""

        def __init__(self, backbone, head):
            super().__init__(backbone, head)
            self.backbone.register_forward_hook(lambda module, inputs, features: 1 + 1e-3 * features)

    pretrain(tmp_path, method=Collapsed, settings=None)
    rows = [row for row in logged(tmp_path) if row["train/embedding_std"]]
    assert float(rows[-1]["train/embedding_std"]) > 0.5
    assert caplog.text.count("Collapse: nearly the same features") == 1


def test_the_first_batch_of_moco_fills_the_queue_and_takes_no_step(tmp_path):
    one_batch = partial(short_data, batch_size=len(digits(image_size=SIZE).pretrain))
    moco = partial(MoCo, temperature=0.2, queue_size=300)
    report = pretrain(tmp_path, one_batch, replace(CPU, max_epochs=1), None, method=moco)
    assert report["training"]["batches_without_step"] == 1
    content = read_checkpoint(tmp_path)
    assert content["optimizer_states"][0]["state"] == {}  # neither moments nor weight decay
    assert int(content["state_dict"]["method.queue.filled"]) == 300


def test_a_run_with_a_queue_logs_it_and_says_when_it_is_large(tmp_path, caplog):
    with caplog.at_level("INFO"):
        report = pretrain(tmp_path, method=partial(MoCo, temperature=0.2, queue_size=5000))
    assert report["method"] == "MoCo"
    assert report["training"]["batches_without_step"] == 1
    assert "method.queue_size=5000: larger than the data set of 1347 images" in caplog.text
    rows = training_rows(tmp_path)
    assert 0 < float(rows[0]["train/queue_fill"]) < float(rows[-1]["train/queue_fill"]) < 1
    assert float(rows[-1]["train/queue_age"]) >= 5
    assert float(rows[-1]["train/queue_masked"]) > 0  # the second epoch meets the first one's keys
    assert 0 < float(rows[-1]["train/chance"]) < math.log(5001)
    network = twoview.load(tmp_path).network
    weights = read_checkpoint(tmp_path)["state_dict"]
    name = next(iter(network.state_dict()))
    assert torch.equal(network.state_dict()[name], weights[f"method.backbone.{name}"])
    assert not torch.equal(weights[f"method.backbone.{name}"], weights[f"method.key_encoder.copy.0.{name}"])
