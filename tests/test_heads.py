import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from twoview.errors import UserError
from twoview.heads import output_width, projection_head


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
def test_values_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=f"head.{next(iter(knobs))}"):
        projection_head(20, **knobs)


def test_a_head_without_linear_layers_has_no_known_width():
    with pytest.raises(ValueError, match="no linear layer"):
        output_width(nn.Sequential(nn.ReLU()))


def test_defaults_equal_the_config_of_simclr():
    config = OmegaConf.load(Path(__file__).parents[1] / "conf" / "head" / "simclr.yaml")
    defaults = {name: p.default for name, p in inspect.signature(projection_head).parameters.items()}
    assert {k: v for k, v in config.items() if not k.startswith("_")}.items() <= defaults.items()
