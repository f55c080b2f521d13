"""Folding of BatchNorm into convolutions: equal features, and networks in which it must stay."""

import copy

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from twoview import load
from twoview.backbones import create_backbone
from twoview.folding import fold_batch_norm


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def with_random_statistics(network: nn.Module) -> nn.Module:
    """The network in evaluation mode and float64; a BatchNorm at initialization would hardly change anything."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return network.eval().double()


@torch.no_grad()
def check_equal(network: nn.Module, folded: nn.Module, channels: int = 3) -> None:
    images = torch.randn(2, channels, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(folded(images), network(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet10_narrow", "test_resnet", "test_efficientnet", "test_byobnet"])
def test_features_are_equal(name: str) -> None:
    network = with_random_statistics(create_backbone(name)[0])
    before = copy.deepcopy(network.state_dict())
    folded = fold_batch_norm(network)
    assert norms(network) > 0 == norms(folded)
    check_equal(network, folded)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for convolutions, layout in ((network, torch.contiguous_format), (folded, torch.channels_last)):
        weights = [each.weight for each in convolutions.modules() if isinstance(each, nn.Conv2d)]
        assert all(weight.is_contiguous(memory_format=layout) for weight in weights)


def test_network_without_batch_norm_is_returned() -> None:
    network = create_backbone("test_vit")[0]
    assert fold_batch_norm(network) is network


def test_network_in_training_mode() -> None:
    network = with_random_statistics(create_backbone("test_resnet")[0])
    folded = fold_batch_norm(copy.deepcopy(network).train())
    assert not folded.training
    check_equal(network, folded)


def test_network_with_weights_of_five_dimensions() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Unflatten(1, (1, 8)), nn.Conv3d(1, 2, 3)
    network = with_random_statistics(nn.Sequential(*layers))
    folded = fold_batch_norm(network)
    assert norms(folded) == 0
    check_equal(network, folded)


class Net(nn.Module):
    """A convolution and a BatchNorm that are combined in different ways."""

    def __init__(self, way: str, conv: nn.Module | None = None) -> None:
        super().__init__()
        self.way, self.conv, self.norm = way, conv or nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.way == "output used twice":
            return self.norm(y) + y
        if self.way == "convolution applied twice":
            return self.norm(y) + self.conv(y.relu())
        if self.way == "BatchNorm applied twice":
            return self.norm(y) + self.norm(x)
        if self.way == "depends on values" and y.sum() > 0:
            return y
        if self.way == "weights of the convolution used":
            return self.norm(y) + self.conv.weight.sum()
        if self.way == "weights of BatchNorm used":
            return self.norm(y) * self.norm.weight.sum()
        if self.way == "between":
            y = y.relu()
        return self.norm(y)


STAYS = ["output used twice", "convolution applied twice", "BatchNorm applied twice", "between", "depends on values"]
STAYS += ["weights of the convolution used", "weights of BatchNorm used"]


@pytest.mark.parametrize("way", STAYS)
def test_batch_norm_stays(way: str) -> None:
    network = with_random_statistics(Net(way))
    folded = fold_batch_norm(network)
    assert folded is network
    check_equal(network, folded)


def test_batch_norm_goes() -> None:
    network = with_random_statistics(Net("plain"))
    folded = fold_batch_norm(network)
    assert norms(folded) == 0
    check_equal(network, folded)


@pytest.mark.parametrize("kind", ["standardized", "parametrized", "hook", "batch statistics", "shared"])
def test_changed_modules_stay(kind: str) -> None:
    conv = StdConv2d(3, 3, 3, padding=1) if kind == "standardized" else None
    network: nn.Module = Net("plain", conv)
    if kind == "parametrized":
        parametrizations.weight_norm(network.conv)
    if kind == "hook":
        network.conv.register_forward_hook(lambda module, given, result: 2 * result)
    if kind == "batch statistics":
        network.norm = nn.BatchNorm2d(3, track_running_stats=False)
    if kind == "shared":  # one module under two names
        network = nn.Sequential(network.conv, network.norm, network.conv)
    network = with_random_statistics(network)
    folded = fold_batch_norm(network)
    assert norms(folded) == 1
    check_equal(network, folded)


def test_encoder() -> None:
    encoder = load("random:test_resnet", image_size=32)
    with_random_statistics(encoder.network).float().train()
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    folded = encoder.folded()
    assert norms(folded.network) == 0
    assert folded.card == encoder.card
    torch.testing.assert_close(folded(images), encoder(images), rtol=1e-4, atol=1e-5)
    assert encoder.network.training
    assert folded.folded().network is folded.network
    assert encoder.to("meta").folded().device.type == "meta"
