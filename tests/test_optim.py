from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from timm.optim import Lars

from twoview.backbones import create_backbone
from twoview.errors import UserError
from twoview.heads import projection_head
from twoview.optim import OptimizerSettings, describe_groups


def test_biases_and_norms_are_neither_decayed_nor_adapted():
    network, _ = create_backbone("test_resnet", image_size=32)
    settings = OptimizerSettings(partial(Lars, momentum=0.9), lr=0.3, weight_decay=1e-6, lr_scaling="linear")
    optimizer = settings.build(network, 512)
    plain, decayed = optimizer.param_groups
    assert plain["weight_decay"] == 0
    assert not plain.get("always_adapt")
    assert decayed["weight_decay"] == 1e-6
    assert {id(p) for p in plain["params"]} == {id(p) for p in network.parameters() if p.ndim == 1}
    assert plain["lr"] == decayed["lr"] == pytest.approx(0.6)
    lines = describe_groups(optimizer)
    assert "weight decay 0, layer-wise adapted no, learning rate 0.6" in lines[0]
    assert "weight decay 1e-06, layer-wise adapted yes, learning rate 0.6" in lines[1]


def test_parameters_without_gradient_are_excluded():
    head = projection_head(8)
    head[0].requires_grad_(False)
    optimizer = OptimizerSettings(torch.optim.SGD, lr=0.1).build(head, 256)
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
def test_values_out_of_range_are_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        OptimizerSettings(torch.optim.SGD, **knobs)


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize(
    ("network", "names"),
    [
        (torch.nn.Linear(2, 2), ["biases and norms", "weights"]),
        (torch.nn.Linear(2, 2, bias=False), ["weights"]),
        (torch.nn.LayerNorm(2), ["biases and norms"]),
    ],
)
def test_a_kind_of_parameters_that_is_missing_has_no_group(network, names, weight_decay, factory):
    optimizer = OptimizerSettings(factory, weight_decay=weight_decay).build(network, 256)
    assert [group["name"] for group in optimizer.param_groups] == names
    assert [group["weight_decay"] for group in optimizer.param_groups][-1] == weight_decay * ("weights" in names)
    assert len(describe_groups(optimizer)) == len(names)


def test_lars_without_decay_is_refused():
    with pytest.raises(UserError, match=r"optimizer.weight_decay=0: LARS"):
        OptimizerSettings(partial(Lars, momentum=0.9), lr=0.3, weight_decay=0.0)


def test_arguments_that_the_factory_refuses_are_named():
    with pytest.raises(UserError, match=r"optimizer.factory: .*nesterov"):
        OptimizerSettings(partial(torch.optim.AdamW, nesterov=True)).build(projection_head(8), 256)


def test_defaults_equal_the_config_of_adamw():
    config = OmegaConf.load(Path(__file__).parents[1] / "conf" / "optimizer" / "adamw.yaml")
    settings = OptimizerSettings()
    assert {knob: config[knob] for knob in ("lr", "weight_decay", "lr_scaling")} == {
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "lr_scaling": settings.lr_scaling,
    }
    assert config.factory["_target_"] == "torch.optim.AdamW"
    assert settings.factory.func is torch.optim.AdamW
    assert tuple(config.factory.betas) == settings.factory.keywords["betas"]
    assert config.factory.keys() == {"_target_", "_partial_", *settings.factory.keywords}
