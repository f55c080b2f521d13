"""Activation checkpointing changes no result, also not the running statistics of BatchNorm."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from short_runs import CPU, SIZE, assert_same, pretrain
from torch import nn

import twoview
from twoview.backbones import build_arguments, create_backbone
from twoview.errors import UserError
from twoview.heads import projection_head
from twoview.loading import read_checkpoint
from twoview.methods import MoCoV3, SimCLR
from twoview.recomputation import recompute_activations
from twoview.training.gradient_caching import split_batch, step_in_pieces

NETWORKS = {
    "resnet10_narrow": {"drop_path_rate": 0.3, "zero_init_last": False},
    "test_efficientnet": {"drop_path_rate": 0.3},
    "test_vit": {"drop_path_rate": 0.3},
    "test_convnext": {},
}


def network(name, checkpointing):
    torch.manual_seed(0)
    return create_backbone(name, image_size=32, options=NETWORKS[name], checkpointing=checkpointing)[0]


def images(n=12):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(built, steps=2):
    """Features and gradients of some steps."""
    values = []
    for step in range(steps):
        torch.manual_seed(step)
        features = built(images())
        built.zero_grad()
        features.square().mean().backward()
        values += [features.detach(), *(p.grad.clone() for p in built.parameters() if p.grad is not None)]
    return values


def assert_equal_states(one, other):
    for (name, value), wanted in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("name", NETWORKS)
def test_features_gradients_and_statistics_are_the_same(name):
    plain, checkpointed = network(name, False), network(name, True)
    calls = {}
    for built in (plain, checkpointed):
        for module in built.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *_, b=built: calls.__setitem__(b, calls.get(b, 0) + 1))
    expected, found = trained(plain), trained(checkpointed)
    assert calls[checkpointed] > 1.4 * calls[plain]  # it does compute activations again
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_equal_states(checkpointed, plain)
    assert build_arguments(checkpointed) == build_arguments(plain)
    with torch.inference_mode():
        assert torch.equal(checkpointed.eval()(images()), plain.eval()(images()))


def test_without_the_hooks_the_statistics_would_differ():
    plain, checkpointed = network("resnet10_narrow", False), network("resnet10_narrow", False)
    checkpointed.set_grad_checkpointing(True)
    trained(plain)
    trained(checkpointed)
    counts = [int(built.layer1[0].bn1.num_batches_tracked) for built in (plain, checkpointed)]
    assert counts == [2, 4]


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("method", [SimCLR, partial(MoCoV3, predictor=partial(projection_head, out_dim=16))])
def test_methods_have_the_same_statistics(method, in_pieces):
    built = []
    for checkpointing in (False, True):
        backbone = network("resnet10_narrow", checkpointing)
        made = method(backbone, projection_head(256, hidden_dim=32, out_dim=16))
        views = images().chunk(2)
        torch.manual_seed(1)
        if in_pieces:
            step = step_in_pieces(made, lambda part, v=views: [view[part] for view in v], split_batch(6, 3), (0,))
        else:
            step = made(*views)
        step.loss.backward()
        built.append(made)
    assert_equal_states(*built)
    for one, other in zip(built[0].parameters(), built[1].parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_a_run_is_the_same_and_its_checkpoint_is_evaluated_without_recomputation(tmp_path):
    trainer = replace(CPU, max_epochs=1)
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        backbone = partial(create_backbone, "test_resnet", in_chans=1, image_size=SIZE, checkpointing=checkpointing)
        pretrain(tmp_path / name, trainer=trainer, backbone=backbone, settings=None)
    assert_same(tmp_path / "plain", tmp_path / "checkpointed")
    cards = [read_checkpoint(tmp_path / name)["twoview"]["backbone"] for name in ("plain", "checkpointed")]
    assert cards[0] == cards[1]
    assert not twoview.load(tmp_path / "checkpointed").network.grad_checkpointing


@pytest.mark.parametrize("name", ["convit_tiny", "selecsls42"])
def test_networks_that_timm_cannot_checkpoint_are_refused(name):
    with pytest.raises(UserError, match=f"backbone.checkpointing=true: timm does not support it for {name}"):
        create_backbone(name, image_size=64, checkpointing=True)
    with pytest.raises(UserError, match="does not support it for own"):
        recompute_activations(nn.Linear(2, 2), "own")
