from functools import partial

import pytest
import torch
from timm.optim import Lars
from torch import nn

from twoview.backbones import create_backbone
from twoview.errors import UserError
from twoview.heads import projection_head
from twoview.optim import Optimization, describe_groups


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_heads_have_the_papers_layers(layers):
    head = projection_head(20, hidden_dim=16, out_dim=8, layers=layers)
    assert head(torch.randn(4, 20)).shape == (4, 8)
    kinds = [type(m) for m in head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (layers - 1) + [nn.Linear, nn.BatchNorm1d]
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))


def test_heads_without_batchnorm_have_biases():
    head = projection_head(20, hidden_bn=False, last_bn=False)
    assert [type(m) for m in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(m.bias is not None for m in head if isinstance(m, nn.Linear))


def test_the_last_batchnorm_may_be_without_scale():
    head = projection_head(20, last_affine=False)
    assert head[1].weight is not None
    assert head[-1].weight is None


@pytest.mark.parametrize("knobs", [{"layers": 4}, {"layers": 0}, {"hidden_dim": 0}, {"out_dim": -1}])
def test_impossible_heads_are_refused(knobs):
    with pytest.raises(UserError, match=f"head.{next(iter(knobs))}"):
        projection_head(20, **knobs)


def test_biases_and_norms_are_neither_decayed_nor_adapted():
    network, _ = create_backbone("test_resnet", image_size=32)
    optimizer = Optimization(partial(Lars, momentum=0.9), lr=0.3, weight_decay=1e-6, lr_scaling="linear").build(
        network, 512
    )
    plain, decayed = optimizer.param_groups
    assert plain["weight_decay"] == 0
    assert not plain.get("always_adapt")
    assert decayed["weight_decay"] == 1e-6
    assert {id(p) for p in plain["params"]} == {id(p) for p in network.parameters() if p.ndim == 1}
    assert plain["lr"] == decayed["lr"] == pytest.approx(0.6)
    words = describe_groups(optimizer)
    assert "weight decay 0, layer-wise adapted no, learning rate 0.6" in words[0]
    assert "weight decay 1e-06, layer-wise adapted yes, learning rate 0.6" in words[1]


def test_parameters_without_gradient_are_left_out():
    head = projection_head(8)
    head[0].requires_grad_(False)
    optimizer = Optimization(torch.optim.SGD, lr=0.1).build(head, 256)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"lr": -1}, "optimizer.lr=-1"),
        ({"lr": 0}, "optimizer.lr=0"),
        ({"lr": float("nan")}, "optimizer.lr=nan"),
        ({"lr": 1, "weight_decay": -1}, "optimizer.weight_decay=-1"),
        ({"lr": 1, "lr_scaling": "cubic"}, "optimizer.lr_scaling=cubic"),
    ],
)
def test_impossible_optimisers_are_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        Optimization(torch.optim.SGD, **knobs)


def test_lars_without_decay_is_refused():
    with pytest.raises(UserError, match=r"optimizer.weight_decay=0: LARS"):
        Optimization(partial(Lars, momentum=0.9), lr=0.3, weight_decay=0.0)
