"""Batches whose images are encoded in pieces against the whole batch: gradients, statistics, draws and runs."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from short_runs import CPU, SIZE, StopsAfter, assert_same, losses, pretrain, short_data
from small_methods import ALL, filled, make
from torch import nn
from torch.nn import functional as F

from twoview.augment import TwoViews, derive_seed
from twoview.backbones import create_backbone
from twoview.errors import Interrupted, UserError
from twoview.heads import projection_head
from twoview.methods import NNCLR, Encoded, Method, MoCo, MoCoV3, SimCLR, Step, SupCon
from twoview.momentum import MomentumCopy
from twoview.optim import OptimizerSettings
from twoview.training import TrainerSettings
from twoview.training.gradient_caching import check_micro_batch, split_batch, step_in_pieces

N, KEY = 11, (3, 1)
IDS, LABELS = torch.arange(N), torch.arange(N) % 3 - 1
IN_BATCH = [SimCLR, MoCoV3, SupCon, NNCLR]
PIECES = split_batch(N, 4)
without_bn = partial(projection_head, hidden_dim=32, out_dim=16, hidden_bn=False, last_bn=False)


def make_groupnorm(method, drop_path=0.3):
    """A method on a ResNet with GroupNorm and drop path, in float64; heads have no BatchNorm."""
    torch.manual_seed(0)
    # Otherwise the last norm layer of a residual branch is zero, and drop path has no effect.
    options = {"norm_layer": "groupnorm", "drop_path_rate": drop_path, "zero_init_last": False}
    backbone, width = create_backbone("resnet10_narrow", image_size=32, options=options)
    knobs = {"queue_size": 16} if method is NNCLR else {}
    knobs |= {"predictor": without_bn} if method in (MoCoV3, NNCLR) else {}
    return filled(method(backbone, without_bn(width), **knobs)).double()


def two_views(n=N):
    return torch.randn(2, n, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()


def slices_of(views):
    return lambda part: [view[part].to(memory_format=torch.channels_last) for view in views]


def gradients(method, loss):
    method.zero_grad()
    loss.backward()
    return [p.grad for p in method.parameters() if p.requires_grad]


def seeded_after_each_call(method, piece):
    """Hooks that seed the generator after each call of a momentum encoder, as the pieces do."""
    calls = iter(range(1, 10))

    def seed(*_):
        torch.manual_seed(derive_seed((*KEY, piece, next(calls))))

    return [m.register_forward_hook(seed) for m in method.modules() if isinstance(m, MomentumCopy)]


def with_all_activations(method, views, context=torch.enable_grad):
    """The loss of the whole batch with the draws of the pieces, by plain autograd: all activations stay in memory."""
    parts = []
    for i, piece in enumerate(PIECES):
        hooks = seeded_after_each_call(method, i)
        with context():
            torch.manual_seed(derive_seed((*KEY, i)))
            parts.append(method.encode(*slices_of(views)(piece)))
        for hook in hooks:
            hook.remove()
    names = ("embeddings", "predictions", "targets")
    joined = {n: tuple(map(torch.cat, zip(*(getattr(p, n) for p in parts), strict=True))) for n in names}
    return method.loss(Encoded(torch.cat([p.features for p in parts]), **joined), IDS, LABELS)


def assert_near(found, expected, relative):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= relative * other.norm()
    assert sum(one is not None and one.abs().max() > 1e-6 for one in found) > 10


@pytest.mark.parametrize("images", [2, 3, 4, 5, 7, 11, 64, 1000])
@pytest.mark.parametrize("micro_batch", [2, 3, 4, 100, 1000])
def test_pieces_cover_the_batch_and_have_nearly_equal_sizes(images, micro_batch):
    pieces = split_batch(images, micro_batch)
    assert [i for piece in pieces for i in range(images)[piece]] == list(range(images))
    sizes = [piece.stop - piece.start for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    assert max(sizes) <= (3 if micro_batch == 2 and images % 2 else micro_batch)


@pytest.mark.parametrize("method", IN_BATCH)
def test_gradients_are_those_of_the_whole_batch(method):
    built, views = make_groupnorm(method, drop_path=0.0), two_views()
    whole = built(*views, ids=IDS, labels=LABELS)
    expected = gradients(built, whole.loss)
    step = step_in_pieces(built, slices_of(views), PIECES, KEY, IDS, LABELS)
    assert_near(gradients(built, step.loss), expected, 1e-9)
    torch.testing.assert_close(step.loss, whole.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(step.features, whole.features)
    torch.testing.assert_close(step.embeddings, whole.embeddings)
    assert step.logs.keys() == whole.logs.keys()


def test_a_learned_temperature_has_the_gradient_of_the_whole_batch():
    built, views = make_groupnorm(partial(SimCLR, learn_temperature=True), drop_path=0.0), two_views()
    expected = gradients(built, built(*views).loss)
    step = step_in_pieces(built, slices_of(views), PIECES, KEY, IDS, LABELS)
    assert_near(gradients(built, step.loss), expected, 1e-9)
    assert built.temperature.log_scale.grad.abs() > 1e-4


@pytest.mark.parametrize("method", IN_BATCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_with_drop_path_are_those_of_the_same_draws(method, dtype):
    built, views = make_groupnorm(method).to(dtype), [view.to(dtype) for view in two_views()]
    expected = gradients(built, with_all_activations(built, views).loss)
    step = step_in_pieces(built, slices_of(views), PIECES, KEY, IDS, LABELS)
    found = gradients(built, 3 * step.loss)  # an outer factor, such as that of a gradient scaler
    assert_near([None if g is None else g / 3 for g in found], expected, 1e-5 if dtype == torch.float32 else 1e-9)
    other = step_in_pieces(built, slices_of(views), PIECES, (4, 1), IDS, LABELS)
    assert other.loss != step.loss  # drop path is on


class KeysInBetween(Method):
    """A method that applies a momentum encoder before its other networks have drawn all their random numbers."""

    def __init__(self, backbone, head):
        super().__init__(backbone, head)
        self.target = MomentumCopy(nn.Sequential(self.backbone, self.head))
        self.scale = nn.Parameter(torch.tensor(2.0))  # enters the loss only

    def encode(self, *views):
        features, first = self.embed(views[0])
        targets = tuple(self.target(view) for view in views)
        return Encoded(features, first + self.embed(views[1])[1], targets=targets)

    def loss(self, encoded, ids=None, labels=None):
        a, b = (F.normalize(z) @ F.normalize(t).T for z, t in zip(encoded.embeddings, encoded.targets, strict=True))
        loss = ((self.scale * a).logsumexp(1) + (self.scale * b).logsumexp(0)).mean()
        return Step(loss, encoded.features, tuple(z.detach() for z in encoded.embeddings))


def test_momentum_encoders_are_applied_once_and_do_not_shift_the_random_draws():
    built, views = make_groupnorm(KeysInBetween), two_views()
    expected = gradients(built, with_all_activations(built, views).loss)
    applied = []
    built.target.copy.register_forward_hook(lambda *_: applied.append("copy"))
    built.backbone.register_forward_hook(lambda *_: applied.append("own"))
    assert_near(gradients(built, step_in_pieces(built, slices_of(views), PIECES, KEY).loss), expected, 1e-9)
    assert built.scale.grad.abs() > 1e-3
    assert (applied.count("copy"), applied.count("own")) == (2 * len(PIECES), 4 * len(PIECES))
    x = two_views()[0]
    assert built.target.stored_outputs is None
    built.eval()
    assert torch.equal(built.target(x), built.target.copy(x))


@pytest.mark.parametrize("method", IN_BATCH)
@pytest.mark.parametrize("bn", ["plain", "split"])
def test_statistics_of_batchnorm_are_updated_once_for_each_piece(method, bn):
    built = filled(make(method, **ALL[method], bn=bn))
    views, pieces = slices_of([view.float() for view in two_views()]), split_batch(N, 4 if bn == "plain" else 8)
    expected = copy.deepcopy(built)
    with torch.no_grad():
        for piece in pieces:
            expected.encode(*views(piece))
    step_in_pieces(built, views, pieces, KEY, IDS, LABELS).loss.backward()
    for (name, found), wanted in zip(built.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(found, wanted), name
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)


def test_both_forward_passes_have_the_precision_of_the_context():
    built, views = make_groupnorm(SimCLR).float(), [view.float() for view in two_views()]
    context, kinds = partial(torch.autocast, "cpu", torch.bfloat16), []
    built.head.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with context():
        step = step_in_pieces(built, slices_of(views), PIECES, KEY, IDS, LABELS, context)
    assert step.loss.dtype == torch.float32
    found = gradients(built, step.loss)
    assert kinds == 2 * len(PIECES) * [torch.bfloat16]
    expected = gradients(built, with_all_activations(built, views, context=context).loss)
    assert_near(found, expected, 0.005)


@pytest.mark.parametrize(
    ("method", "knobs", "micro_batch", "named"),
    [
        (MoCo, {}, 4, "trainer.micro_batch=4: MoCo does not compare .*; use trainer.accumulate=N"),
        (
            SimCLR,
            {"bn": "split", "bn_groups": 3},
            6,
            "trainer.micro_batch=6: pieces of 5 .* of the 3 .* at least 12",
        ),
    ],
)
def test_pieces_that_mean_nothing_are_refused(method, knobs, micro_batch, named):
    with pytest.raises(UserError, match=named):
        check_micro_batch(micro_batch, make(method, **knobs), N, world=1)


def test_groups_of_batchnorm_are_counted_on_each_rank():
    check_micro_batch(6, make(SimCLR, bn="split", bn_groups=4), N, world=2)
    with pytest.raises(UserError, match="trainer.micro_batch=6: pieces of 5"):
        check_micro_batch(6, make(SimCLR, bn="split", bn_groups=4), N, world=1)


# Through the public function: digits, networks without BatchNorm, five batches an epoch.
BACKBONE = partial(create_backbone, "resnet10_narrow", in_chans=1, image_size=SIZE, options={"norm_layer": "groupnorm"})
DROPPING = partial(BACKBONE, options={"norm_layer": "groupnorm", "drop_path_rate": 0.2, "zero_init_last": False})
SHORT = TrainerSettings(max_epochs=1, accelerator="cpu", precision="32-true", log_every=1, check_every=0)


def images():
    data = short_data()
    data.pretrain = data.pretrain.subset(torch.arange(650))
    return data


def train(folder, micro_batch=None, after=None, trainer=SHORT, backbone=BACKBONE, **changes):
    changes = {
        "data": images,
        "backbone": backbone,
        "head": without_bn,
        "optimizer": OptimizerSettings(torch.optim.SGD, lr=0.01),
        "settings": None,
        "loggers": [StopsAfter(folder, after)],
    } | changes
    return pretrain(folder, trainer=replace(trainer, micro_batch=micro_batch), **changes)


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory):
    """Folder of an uninterrupted run in pieces, with drop path."""
    folder = tmp_path_factory.mktemp("pieces")
    train(folder, 50, backbone=DROPPING)
    return folder


class Watched(SimCLR):
    """A method that records how many images it encodes together."""

    images: list

    def encode(self, *views):
        Watched.images.append(len(views[0]))
        return super().encode(*views)


@pytest.mark.parametrize("engine", ["fused", "kornia"])
def test_a_run_in_pieces_logs_the_losses_of_the_whole_batch(tmp_path, engine):
    changes = {"augment": partial(TwoViews, crop_scale=(0.4, 1.0), flip_p=0.0, blur_p=0.0, engine=engine)}
    # A large learning rate would let differences of rounding grow from step to step.
    changes["optimizer"] = OptimizerSettings(torch.optim.SGD, lr=1e-3)
    found = []
    for name, micro_batch, encoded in (("whole", 128, [128]), ("pieces", 50, [43, 43, 42] * 2)):
        Watched.images = []
        train(tmp_path / name, micro_batch, method=Watched, **changes)
        assert Watched.images == 5 * encoded
        found.append([float(loss) for loss in losses(tmp_path / name)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert len(set(found[0])) == 5


def test_a_run_in_pieces_is_resumed_to_the_same_last_digit(tmp_path, in_pieces):
    with pytest.raises(Interrupted):
        train(tmp_path, 50, after=2, backbone=DROPPING)
    with pytest.raises(UserError, match="trainer.micro_batch was 50, is 60"):
        train(tmp_path, 60, backbone=DROPPING, resume=True)
    train(tmp_path, 50, backbone=DROPPING, resume=True)
    assert_same(in_pieces, tmp_path)


def test_accumulation_of_in_batch_methods_is_explained_once(tmp_path, caplog):
    caplog.set_level("INFO")
    train(tmp_path, 64, trainer=replace(SHORT, accumulate=2))
    message = "trainer.accumulate=2: adds no negatives, since SimCLR compares the images of one batch"
    assert caplog.text.count(message) == 1
    assert "trainer.micro_batch=N" in caplog.text


def test_a_method_with_a_queue_is_refused_pieces_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="trainer.micro_batch=64: MoCo does not compare"):
        train(tmp_path / "run", 64, method=partial(MoCo, queue_size=300))
    assert not (tmp_path / "run").exists()


class BreaksOnce(SimCLR):
    """A method whose loss is not a number in the third batch."""

    batches = 0

    def loss(self, encoded, ids=None, labels=None):
        step = super().loss(encoded, ids, labels)
        self.batches += 1
        return replace(step, loss=step.loss * (float("nan") if self.batches == 3 else 1))


def test_a_batch_in_pieces_may_be_skipped(tmp_path):
    report = train(tmp_path, 50, trainer=replace(CPU, max_epochs=1, skip_nonfinite=1), method=BreaksOnce)
    assert report["training"]["batches_not_finite"] == 1
    assert report["training"]["steps"] == 4
