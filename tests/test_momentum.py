import pytest
import torch
from torch import nn

from twoview.errors import UserError
from twoview.momentum import MomentumCopy


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def test_the_copy_starts_equal_and_has_no_gradient():
    original = network()
    copy = MomentumCopy(original)
    assert all(torch.equal(a, b) for a, b in zip(copy.copy.parameters(), original.parameters(), strict=True))
    assert not any(p.requires_grad for p in copy.parameters())
    assert not copy(torch.randn(5, 3).double()).requires_grad
    assert set(copy.state_dict()) == {f"copy.{name}" for name in original.state_dict()}


def test_follow_is_the_moving_average_in_loops():
    original = network()
    copy = MomentumCopy(original)
    expected = [p.detach().clone() for p in original.parameters()]
    for step in range(5):
        with torch.no_grad():
            for p in original.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        copy.follow(0.9)
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, original.parameters(), strict=True)]
    for average, wanted in zip(copy.copy.parameters(), expected, strict=True):
        torch.testing.assert_close(average, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("momentum", "wanted"), [(1.0, "before"), (0.0, "original")])
def test_momentum_0_and_1(momentum, wanted):
    original = network()
    copy = MomentumCopy(original)
    before = [p.clone() for p in copy.copy.parameters()]
    with torch.no_grad():
        for p in original.parameters():
            p.mul_(3)
    copy.follow(momentum)
    target = before if wanted == "before" else list(original.parameters())
    assert all(torch.equal(a, b) for a, b in zip(copy.copy.parameters(), target, strict=True))


@pytest.mark.parametrize("statistics", ["own", "average", "copy"])
def test_batchnorm_statistics(statistics):
    original = network()
    copy = MomentumCopy(original, statistics)
    original(torch.randn(50, 3).double() * 4)
    copy.follow(0.75)
    source, average = original[1].running_var, copy.copy[1].running_var
    wanted = {"own": torch.ones(4).double(), "average": 0.75 + 0.25 * source, "copy": source}[statistics]
    torch.testing.assert_close(average, wanted)
    assert copy.copy[1].num_batches_tracked == (0 if statistics == "own" else 1)


def test_the_original_is_not_a_submodule_of_the_copy():
    original = network()
    holder = nn.Module()
    holder.original, holder.average = original, MomentumCopy(original)
    holder.float()
    holder.average.follow(0.5)
    assert holder.average.copy[0].weight.dtype == torch.float32
    assert len(list(holder.parameters())) == 2 * len(list(original.parameters()))


def test_unknown_statistics_are_refused():
    with pytest.raises(UserError, match="method.statistics=mine"):
        MomentumCopy(network(), "mine")
