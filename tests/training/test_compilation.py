"""Compilation of the networks during training."""

import shutil

import pytest
import torch
from torch import nn

from twoview.errors import UserError
from twoview.heads import projection_head
from twoview.methods import MoCo
from twoview.training.compilation import compiled, eager, should_compile

CPU = torch.device("cpu")


def tiny():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MoCo(backbone, projection_head(4, hidden_dim=8, out_dim=4), queue_size=16).double()


def steps(method):
    """Losses and gradients of two steps."""
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        step = method(*torch.rand(2, 8, 1, 8, 8, generator=generator).double(), ids=torch.arange(8 * i, 8 * i + 8))
        method.after_batch(step)
    step.loss.backward()
    method.after_update(0.5)
    return [step.loss.detach(), *(p.grad for p in method.parameters() if p.grad is not None)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiled_networks_learn_the_same_and_keep_their_names():
    expected, method = steps(tiny()), tiny()
    names, calls = list(method.state_dict()), []
    other = nn.Identity()
    with compiled(method, enabled=True, others=[other]):
        assert other._compiled_call_impl is not None
        assert list(method.state_dict()) == names
        for network in (method.backbone, method.key_encoder.copy):
            call = network._compiled_call_impl
            network._compiled_call_impl = lambda *x, call=call, n=network: calls.append(n) or call(*x)
        found = steps(method)
        assert set(calls) == {method.backbone, method.key_encoder.copy}
        with eager(method.backbone):
            assert method.backbone._compiled_call_impl is None
        assert method.backbone._compiled_call_impl is not None
    assert method.backbone._compiled_call_impl is None
    assert other._compiled_call_impl is None
    assert method.key_encoder.copy._compiled_call_impl is None
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_what_is_compiled():
    assert should_compile("auto", CPU) is False
    assert should_compile(False, torch.device("cuda")) is False


def test_without_a_compiler_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match=r"trainer.compile=true: there is no C\+\+ compiler; .* trainer.compile=false"):
        should_compile(True, CPU)


def test_a_network_that_cannot_be_compiled_is_a_sentence():
    sentence = r"trainer.compile: the networks cannot be compiled \(no luck\); set trainer.compile=false"
    with pytest.raises(UserError, match=sentence), compiled(tiny(), enabled=False):
        raise torch._dynamo.exc.Unsupported("no luck\nwith details")
    with pytest.raises(RuntimeError, match="other"), compiled(tiny(), enabled=False):
        raise RuntimeError("other")


def test_without_the_knob_nothing_is_compiled():
    method = tiny()
    with compiled(method, enabled=False):
        assert method.backbone._compiled_call_impl is None
