import pytest
import torch
from torch import nn

from twoview.backbones import create_backbone
from twoview.errors import UserError
from twoview.heads import projection_head
from twoview.losses import nt_xent
from twoview.methods import SimCLR


def simclr(**knobs):
    torch.manual_seed(0)
    backbone, width = create_backbone("test_resnet", image_size=32)
    return SimCLR(backbone, projection_head(width, hidden_dim=32, out_dim=16), **knobs)


def views(n=8):
    return torch.randn(2, n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()


def test_simclr_is_one_pass_and_nt_xent():
    method = simclr(temperature=0.3)
    view_a, view_b = views()
    step = method(view_a, view_b)
    features = method.backbone(torch.cat([view_a, view_b]))
    expected = nt_xent(*method.head(features).chunk(2), 0.3)
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.features, features[:8])
    assert not step.features.requires_grad
    assert not any(z.requires_grad for z in step.embeddings)


def test_a_bare_loop_overfits_one_batch():
    method, (view_a, view_b) = simclr(temperature=0.2), views()
    view_b = view_a + 0.1 * view_b
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for _ in range(40):
        step = method(view_a, view_b)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
    assert step.loss.item() < 0.2 < step.logs["chance"]
    assert step.logs["contrastive_top1"] == 1


def test_forward_moves_no_state_but_batchnorm_statistics():
    method = simclr()
    before = {k: v.clone() for k, v in method.state_dict().items() if "running" not in k and "num_batches" not in k}
    step = method(*views())
    method.after_update(0.5)
    method.after_batch(step)
    assert all(torch.equal(v, method.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("knobs", "named"), [({"temperature": 0}, "method.temperature=0"), ({"variant": "dlc"}, "method.variant=dlc")]
)
def test_impossible_knobs_are_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        SimCLR(nn.Identity(), nn.Identity(), **knobs)
