from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from timm.optim import Lars

from twoview.backbones import create_backbone
from twoview.errors import UserError
from twoview.heads import projection_head
from twoview.optim import OptimizerSettings, clip_gradients, describe_groups, replace_settings


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


def trained(factory, steps=5, restored=None):
    """The weights and the optimizer after some steps with fixed gradients."""
    torch.manual_seed(0)
    network, _ = create_backbone("test_resnet", image_size=32)
    network.to(memory_format=torch.channels_last)
    optimizer = OptimizerSettings(factory, lr=1e-2).build(network, 256)
    if restored is not None:
        network.load_state_dict(restored[0])
        optimizer.load_state_dict(restored[1])
        replace_settings(optimizer, OptimizerSettings(factory, lr=1e-2).build(network, 256))
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in network.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator) * 1e-3)
        optimizer.step()
    return network.state_dict(), optimizer.state_dict(), optimizer


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_the_fused_optimizer_equals_the_loop(cls):
    (fused, _, optimizer), (loop, _, other) = trained(cls), trained(partial(cls, foreach=False))
    assert all(group["fused"] for group in optimizer.param_groups)
    assert not any(group["fused"] for group in other.param_groups)
    for name, weight in fused.items():
        torch.testing.assert_close(weight, loop[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"differentiable": True}])
def test_a_factory_that_chooses_an_implementation_is_used_as_it_is(own):
    optimizer = OptimizerSettings(partial(torch.optim.AdamW, **own)).build(projection_head(8), 256)
    (name, value) = next(iter(own.items()))
    assert all(group[name] == value and not group["fused"] for group in optimizer.param_groups)


def test_optimizers_without_a_fused_implementation_are_built():
    for factory in (
        partial(Lars, momentum=0.9),
        torch.optim.RMSprop,
        lambda groups, lr: torch.optim.SGD(groups, lr=lr),
    ):
        assert not any(g.get("fused") for g in OptimizerSettings(factory).build(projection_head(8), 256).param_groups)


@pytest.mark.parametrize("before", [{"foreach": False}, {}])
@pytest.mark.parametrize("after", [{"foreach": False}, {}])
def test_a_checkpoint_of_any_implementation_is_continued_with_another(before, after):
    saved = trained(partial(torch.optim.AdamW, **before))[:2]
    for entry in saved[1]["state"].values():  # as if saved by networks in another memory layout
        entry |= {name: entry[name].contiguous() for name in ("exp_avg", "exp_avg_sq")}
    weights, state, optimizer = trained(partial(torch.optim.AdamW, **after), restored=saved)
    assert [bool(group["fused"]) for group in optimizer.param_groups] == [not after] * 2
    assert all(entry["step"] == 10 for entry in state["state"].values())
    expected = trained(torch.optim.AdamW, steps=5)
    expected = trained(torch.optim.AdamW, restored=expected[:2])[0]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", [{}, {"foreach": False}])
def test_clipping_after_scaling_of_the_loss_equals_clipping_without_it(own):
    def step(scaler):
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 2)
        optimizer = OptimizerSettings(partial(torch.optim.SGD, **own), lr=1.0).build(network, 256)
        loss = network(torch.ones(3, 4)).square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None and own:
            scaler.unscale_(optimizer)  # as Lightning does for optimizers that are not fused
        clip_gradients(optimizer, 0.5, scaler)
        norm = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
        assert norm.item() == pytest.approx(0.5)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        return network.weight

    torch.testing.assert_close(step(torch.amp.GradScaler("cpu")), step(None))


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
