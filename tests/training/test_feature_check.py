import pytest
import torch
from short_runs import logged
from torch import nn

from twoview.data import TensorImages
from twoview.encoder import Encoder, ModelCard
from twoview.training.callbacks import FeatureCheck


def encoder_of(network, size=8):
    return Encoder(network, ModelCard("test", {}, size, 1, mean=(0.0,), std=(1.0,)))


def test_checks_of_a_sample_contain_every_class():
    labels = torch.arange(10).repeat_interleave(100)
    images = TensorImages(torch.zeros(1000, 1, 8, 8, dtype=torch.uint8), labels)
    everything = torch.arange(len(images))
    check = FeatureCheck(encoder_of(nn.Flatten()), images, everything, everything, 10, None, limit=200)
    for part in (check.bank, check.held_out):
        assert len(part) == 200
        assert len(part.labels.unique()) == 10


def test_the_effective_rank_of_a_check_is_that_of_all_classes():
    labels = torch.arange(8).repeat_interleave(300)  # sorted by class, as the images of a folder are
    images = TensorImages((labels * 30).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), labels)

    class Level(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot((255 * x[:, 0, 0, 0] / 30).round().long(), 8).float()

    check = FeatureCheck(encoder_of(Level()), images, torch.arange(2400), None, 8, None)
    figures, message = check.check("cpu")
    assert figures["val/effective_rank"] == pytest.approx(8, rel=1e-3)
    assert figures["val/effective_rank_rows"] == 80
    assert set(figures) == {"val/effective_rank", "val/effective_rank_rows"}
    assert message == "effective rank 8.0 of 8"


def test_knn_of_a_check_classifies_held_out_images_by_the_others():
    labels = torch.arange(40) % 2
    pixels = (labels * 200).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
    pixels[..., ::2] = 100
    pixels[39] = pixels[38]  # its label is another
    images = TensorImages(pixels, labels)
    check = FeatureCheck(encoder_of(nn.Flatten()), images, torch.arange(20), torch.arange(20, 40), 2, None)
    figures, message = check.check("cpu")
    assert figures["val/knn_top1"] == pytest.approx(0.95)
    assert message.startswith("kNN on held-out training images 95.0 %, effective rank")


def test_every_check_is_logged(finished):
    checks = [row for row in logged(finished.folder) if row["val/knn_top1"]]
    assert len(checks) == 2
    assert all(0.3 < float(row["val/knn_top1"]) <= 1 for row in checks)
