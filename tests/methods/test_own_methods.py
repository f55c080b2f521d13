"""Methods that are defined outside of the package."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from short_runs import CPU, StopsAfter, assert_same, logged, losses, pretrain
from torch import nn
from torch.nn import functional as F

import twoview
from twoview.augment import TwoViews
from twoview.errors import Interrupted
from twoview.evaluation import EvaluationSettings
from twoview.heads import projection_head
from twoview.loading import read_checkpoint
from twoview.losses import nt_xent
from twoview.methods import Encoded, Method, SimCLR, Step
from twoview.momentum import MomentumCopy


class BYOL(Method):
    """BYOL, Grill et al. 2020, arXiv:2006.07733: predictions of one view's target by the other view, no negatives."""

    def __init__(self, backbone, head):
        super().__init__(backbone, head)
        self.predictor = projection_head(32, hidden_dim=64, out_dim=32, last_bn=False)
        self.target = MomentumCopy(nn.Sequential(self.backbone, self.head))

    def encode(self, *views):
        features, z = self.embed(*views)
        return Encoded(features, z, tuple(map(self.predictor, z)), tuple(map(self.target, views)))

    def loss(self, encoded, ids=None, labels=None):
        cosines = [F.cosine_similarity(p, t) for p, t in zip(encoded.predictions, encoded.targets[::-1], strict=True)]
        return Step(4 - 2 * sum(cosines).mean(), encoded.features, tuple(z.detach() for z in encoded.embeddings))

    def after_update(self, progress):
        self.target.follow(0.95 + 0.05 * progress)


TRAINER = replace(CPU, log_every=1, max_epochs=3)


@pytest.fixture(scope="module")
def byol(tmp_path_factory):
    """Folder of a run of BYOL."""
    folder = tmp_path_factory.mktemp("byol")
    pretrain(folder, method=BYOL, trainer=TRAINER, settings=EvaluationSettings.from_knobs(parts=["knn"], k=[5]))
    return folder


def test_a_method_without_negatives_trains_and_has_no_chance_level(byol):
    columns = logged(byol)[0].keys()
    assert {"train/loss", "train/alignment", "train/feature_std", "val/knn_top1"} <= columns
    assert "train/chance" not in columns
    values = [float(x) for x in losses(byol)]
    assert sum(values[-5:]) < sum(values[:5])
    assert twoview.load(byol).card.method == "BYOL"
    state = read_checkpoint(byol)["state_dict"]
    name = next(name for name in state if name.startswith("method.backbone."))
    target = state[name.replace("method.backbone.", "method.target.copy.0.")]
    assert not torch.equal(state[name], target)
    torch.testing.assert_close(target, state[name], atol=0.1, rtol=0.1)


def test_a_checkpoint_of_a_method_without_negatives_is_resumed_exactly(byol, tmp_path):
    run = partial(pretrain, tmp_path, method=BYOL, trainer=TRAINER, settings=None)
    with pytest.raises(Interrupted):
        run(loggers=[StopsAfter(tmp_path, after=12)])
    assert 10 < read_checkpoint(tmp_path)["global_step"] < 30
    run(resume=True)
    assert_same(byol, tmp_path)


class ThreeViews(TwoViews):
    """Two views, and a third one of other draws."""

    def forward(self, pixels, key=None, sizes=None):
        return *super().forward(pixels, key, sizes), super().forward(pixels, (*key, 3), sizes)[0]


class ThreeViewSimCLR(SimCLR):
    """The mean NT-Xent of all pairs of views."""

    def loss(self, encoded, ids=None, labels=None):
        assert len(encoded.embeddings) == 3
        pairs = [nt_xent(a, b, self.temperature) for a, b in itertools.combinations(encoded.embeddings, 2)]
        return Step(sum(pairs) / 3, encoded.features, tuple(z.detach() for z in encoded.embeddings), {"pairs": 3.0})


def test_a_method_of_three_views_trains_and_is_evaluated(tmp_path):
    augment = partial(ThreeViews, crop_scale=(0.4, 1.0), flip_p=0.0, blur_p=0.0)
    few = EvaluationSettings.from_knobs(parts=["knn", "geometry"], k=[5], baselines=False)
    report = pretrain(tmp_path, method=ThreeViewSimCLR, augment=augment, trainer=TRAINER, settings=few)
    values = [float(x) for x in losses(tmp_path)]
    assert sum(values[-5:]) < sum(values[:5])
    assert {row["train/pairs"] for row in logged(tmp_path) if row["train/loss"]} == {"3.0"}
    assert report["results"]["trained"]["knn"]["test_top1"] > 0.5
    assert report["results"]["trained"]["geometry"]["alignment"] > 0
