"""Methods on networks that are built in milliseconds."""

from functools import partial

import torch
from torch import nn

from twoview.backbones import create_backbone
from twoview.heads import projection_head
from twoview.methods import NNCLR, MoCo, MoCoV3, SimCLR, SupCon

predictor = partial(projection_head, hidden_dim=32, out_dim=16, last_bn=False)
ALL = {
    SimCLR: {},
    MoCo: {"queue_size": 16},
    MoCoV3: {"predictor": predictor},
    SupCon: {},
    NNCLR: {"predictor": predictor, "queue_size": 16},
}


def make(method, **knobs):
    """A method on a ResNet for images of 32 pixels, with embeddings of width 16."""
    torch.manual_seed(0)
    backbone, width = create_backbone("test_resnet", image_size=32)
    return method(backbone, projection_head(width, hidden_dim=32, out_dim=16), **knobs)


def make_without_bn(method, **knobs):
    """A method whose networks treat each image by itself, in float64."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    plain = {"hidden_dim": 32, "out_dim": 16, "hidden_bn": False, "last_bn": False}
    if "predictor" in knobs:
        knobs["predictor"] = partial(projection_head, **plain)
    return method(backbone, projection_head(32, **plain), **knobs).double()


def filled(method):
    """The method with five keys in its queue, if it has one: of images 0, 3, 50, 51 and 52."""
    for queue in (getattr(method, name, None) for name in ("queue", "support_set")):
        if queue is not None:
            keys = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
            queue.push(keys, torch.tensor([3, 50, 51, 0, 52]))
    return method


def views(n=8):
    """Two views of n images."""
    return torch.randn(2, n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
