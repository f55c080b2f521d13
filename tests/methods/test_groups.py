"""BatchNorm over groups of images."""

import pytest
import torch
from small_methods import make, views
from torch import nn

from twoview.errors import UserError
from twoview.methods import MoCo, SimCLR
from twoview.methods.groups import in_groups, in_shuffled_groups, spread


@pytest.mark.parametrize("n", [8, 11])
def test_split_is_separate_forwards_of_the_groups(n):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    view_a, view_b = views(n)
    together = in_groups(network, (view_a, view_b), 3)
    for g in range(3):
        a, b = network(torch.cat([view_a[g::3], view_b[g::3]])).chunk(2)
        assert torch.equal(together[0][g::3], a)
        assert torch.equal(together[1][g::3], b)
    assert not torch.allclose(torch.cat(together), network(torch.cat([view_a, view_b])))


@pytest.mark.parametrize(("n", "groups"), [(16, 4), (16, 2), (13, 3)])
def test_shuffled_keys_are_in_other_groups_than_the_queries(n, groups):
    order = spread(n, groups)
    parts = torch.arange(n).tensor_split(groups)
    assert all(torch.equal(order[g::groups], part) for g, part in enumerate(parts))
    assert sorted(order.tolist()) == list(range(n))
    for g in range(groups):
        members = order[g::groups]
        from_each = (members % groups).bincount(minlength=groups)  # of the queries' groups
        assert from_each.max() - from_each.min() <= 1


def test_shuffling_returns_each_key_to_its_image():
    built = make(MoCo, queue_size=16, bn="shuffle", bn_groups=2)
    built.key_encoder.eval()  # without batch statistics, the order must not matter
    view = views()[0]
    expected = built.key_encoder(view)
    torch.testing.assert_close(in_shuffled_groups(built.key_encoder, view, 2), expected)
    torch.testing.assert_close(built.encode(view, view).targets[0], expected)
    built.key_encoder.train()
    assert not torch.allclose(built.encode(view, view).targets[0], in_groups(built.key_encoder, (view,), 2)[0])


def test_a_batch_that_is_too_small_for_its_groups_is_refused():
    with pytest.raises(UserError, match="method.bn_groups=8: a batch of 8"):
        make(SimCLR, bn="split", bn_groups=8)(*views())
