"""Computing features changes nothing in networks of timm."""

import pytest
import torch
from torch import nn

from twoview.backbones import create_backbone
from twoview.data import TensorImages
from twoview.encoder import Encoder, ModelCard


def encoder_of(network, size):
    return Encoder(network, ModelCard("test", {}, size, 3, None, (0.5,) * 3, (0.2,) * 3))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_features_change_neither_weights_nor_modes_of_the_network(name):
    network, width = create_backbone(name, image_size=32)
    network.train()
    norm = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm))
    norm.eval()  # another mode than its parent
    before = {k: v.clone() for k, v in network.state_dict().items()}
    modes = [m.training for m in network.modules()]
    pixels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    images = TensorImages(pixels, torch.zeros(10, dtype=torch.long))
    features = encoder_of(network, 32).feature_matrix(images, batch_size=4)
    assert features.shape == (10, width)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in before.items())
    assert modes == [m.training for m in network.modules()]
    assert torch.equal(features, encoder_of(network, 32).feature_matrix(images, batch_size=4))


def test_the_number_of_images_in_a_pass_does_not_change_features():
    encoder = encoder_of(create_backbone("test_resnet", image_size=16)[0], 16)
    pixels = torch.rand(600, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert encoder._images_per_pass(pixels) < len(pixels)
    parts = torch.cat([encoder.apply_network(part) for part in pixels.split(100)])
    torch.testing.assert_close(encoder.apply_network(pixels), parts)
    assert encoder.apply_network(pixels[:0]).shape == (0, encoder.width)
