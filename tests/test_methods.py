from functools import partial

import pytest
import torch
from torch import nn

from twoview.backbones import create_backbone
from twoview.errors import UserError
from twoview.heads import projection_head
from twoview.losses import batch_nce, info_nce, nt_xent
from twoview.methods import NNCLR, MoCo, MoCoV3, SimCLR, SupCon
from twoview.methods.groups import in_groups, spread

predictor = partial(projection_head, hidden_dim=32, out_dim=16, last_bn=False)


def make(method, **knobs):
    torch.manual_seed(0)
    backbone, width = create_backbone("test_resnet", image_size=32)
    return method(backbone, projection_head(width, hidden_dim=32, out_dim=16), **knobs)


def simclr(**knobs):
    return make(SimCLR, **knobs)


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


ALL = {
    SimCLR: {},
    MoCo: {"queue_size": 16},
    MoCoV3: {"predictor": predictor},
    SupCon: {},
    NNCLR: {"predictor": predictor, "queue_size": 16},
}


@pytest.mark.parametrize("method", ALL)
def test_forward_moves_nothing_and_after_batch_and_update_do(method):
    built = make(method, **ALL[method])

    def state():
        kept = {k: v.clone() for k, v in built.state_dict().items()}
        return {k: v for k, v in kept.items() if "running" not in k and "num_batches" not in k}

    before = state()
    step = built(*views(), torch.arange(8), torch.arange(8) % 3)
    assert all(torch.equal(v, before[k]) for k, v in state().items())
    assert built.ready == (method in (SimCLR, MoCoV3, SupCon))
    built.after_batch(step)
    moved = {k for k, v in state().items() if not torch.equal(v, before[k])}
    assert all(k.startswith("queue.") for k in moved)
    assert bool(moved) == (method in (MoCo, NNCLR))
    assert built.ready


@pytest.mark.parametrize("method", ALL)
def test_every_method_overfits_one_batch_in_a_bare_loop(method):
    built, (view_a, view_b) = make(method, temperature=0.2, **ALL[method]), views()
    view_b = view_a + 0.1 * view_b
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for i in range(40):
        step = built(view_a, view_b, torch.arange(8), torch.arange(8))
        if built.ready:
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            built.after_update(i / 40)
            losses.append(step.loss.item())
        built.after_batch(step)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("method", [MoCo, MoCoV3])
def test_the_key_encoder_starts_equal_head_included_and_gets_no_gradient(method):
    built = make(method, **ALL[method])
    ours, keys = nn.Sequential(built.backbone, built.head), built.key_encoder
    assert len(list(keys.parameters())) == len(list(ours.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(keys.parameters(), ours.parameters(), strict=True))
    built(*views(), torch.arange(8)).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in keys.parameters())
    assert all(p.grad is not None for p in ours.parameters())


def test_moco_is_the_papers_pseudocode():
    built = make(MoCo, queue_size=10, temperature=0.2)
    built.queue.push(torch.randn(7, 16), torch.tensor([3, 50, 51, 52, 53, 0, 54]))
    view_a, view_b = views()
    step = built(view_a, view_b, torch.arange(8))
    q = built.head(built.backbone(view_a))
    k = built.key_encoder(view_b)
    queue, ids = built.queue.read()
    total = 0.0
    for i in range(8):
        qi, ki = q[i] / q[i].norm(), k[i] / k[i].norm()
        logits = [qi @ ki] + [qi @ n for n, j in zip(queue, ids, strict=True) if j != i]
        total += torch.nn.functional.cross_entropy(torch.stack(logits)[None] / 0.2, torch.tensor([0]))
    torch.testing.assert_close(step.loss, total / 8)
    torch.testing.assert_close(step.logs["queue_masked"], torch.tensor(2 / 56))
    assert step.logs["queue_fill"] == 0.7
    built.after_batch(step)
    assert sorted(built.queue.read()[1].tolist()) == sorted([0, 54, *range(8)])  # the oldest are gone


def test_moco_symmetric_is_both_directions_and_pushes_both():
    built = make(MoCo, queue_size=64, symmetric=True)
    built.queue.push(torch.randn(9, 16), torch.arange(20, 29))
    view_a, view_b = views()
    step = built(view_a, view_b, torch.arange(8))
    queue, _ = built.queue.read()
    there, back = (
        info_nce(built.head(built.backbone(a)), built.key_encoder(b), queue, 0.2)
        for a, b in ((view_a, view_b), (view_b, view_a))
    )
    torch.testing.assert_close(step.loss, (there + back) / 2)
    built.after_batch(step)
    assert len(built.queue) == 25


def test_moco_without_ids_is_an_error():
    with pytest.raises(ValueError, match="ids"):
        make(MoCo)(*views())


def test_nnclr_takes_the_nearest_stored_neighbour():
    built = make(NNCLR, **ALL[NNCLR])
    built.eval()
    stored = torch.randn(5, 16)
    built.queue.push(stored, torch.arange(5))
    step = built(*views())
    z = built.head(built.backbone(torch.cat(views()))).chunk(2)
    p = [built.predictor(x) for x in z]
    near = [torch.stack([max(stored, key=lambda s, r=row: torch.cosine_similarity(s, r, 0)) for row in x]) for x in z]
    expected = (batch_nce(near[0], p[1], 0.1) + batch_nce(near[1], p[0], 0.1)) / 2
    torch.testing.assert_close(step.loss, expected)


def test_supcon_without_labels_is_simclr():
    torch.testing.assert_close(make(SupCon, temperature=0.2)(*views()).loss, simclr(temperature=0.2)(*views()).loss)


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
    assert sorted(order.tolist()) == list(range(n))
    for g in range(groups):
        members = order[g::groups]
        from_each = (members % groups).bincount(minlength=groups)  # of the queries' groups
        assert from_each.max() - from_each.min() <= 1


def test_shuffle_gives_each_key_back_to_its_image():
    built = make(MoCo, queue_size=16, bn="shuffle", bn_groups=2)
    built.key_encoder.eval()  # without statistics of the batch, the order must not matter
    view = views()[0]
    torch.testing.assert_close(built._keys(view), built.key_encoder(view))
    built.key_encoder.train()
    assert not torch.allclose(built._keys(view), in_groups(built.key_encoder, (view,), 2)[0])


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"temperature": 0}, "method.temperature=0"),
        ({"variant": "dlc"}, "method.variant=dlc"),
        ({"bn": "shuffle"}, "method.bn=shuffle: choose one of plain, split, sync"),
        ({"bn": "split", "bn_groups": 1}, "method.bn_groups=1"),
        pytest.param(
            {"bn": "sync"},
            "method.bn=sync: needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
        ),
    ],
)
def test_impossible_knobs_are_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        SimCLR(nn.Identity(), nn.Identity(), **knobs)


@pytest.mark.parametrize(
    ("method", "knobs", "named"),
    [
        (MoCo, {"momentum": 1.5}, "method.momentum=1.5"),
        (MoCo, {"queue_size": 0}, "method.queue_size=0"),
        (MoCo, {"statistics": "none"}, "method.statistics=none"),
        (MoCoV3, {"momentum_end": -1.0, "predictor": predictor}, "method.momentum_end=-1"),
        (MoCoV3, {"freeze_patch_embedding": True, "predictor": predictor}, "method.freeze_patch_embedding=true"),
        (SupCon, {"temperature": -1}, "method.temperature=-1"),
    ],
)
def test_impossible_knobs_of_other_methods_are_refused(method, knobs, named):
    with pytest.raises(UserError, match=named):
        make(method, **knobs)


def test_a_batch_too_small_for_its_groups():
    with pytest.raises(UserError, match="method.bn_groups=8: a batch of 8"):
        simclr(bn="split", bn_groups=8)(*views())


def test_a_frozen_patch_embedding_stays():
    torch.manual_seed(0)
    backbone, width = create_backbone("test_vit", image_size=32)
    built = MoCoV3(backbone, projection_head(width, 32, 16), predictor, freeze_patch_embedding=True)
    built(*views()).loss.backward()
    assert all(p.grad is None for p in built.backbone.patch_embed.parameters())
    assert built.backbone.blocks[0].attn.qkv.weight.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ALL)
def test_sync_replaces_every_batchnorm(method):
    built = make(method, **ALL[method], bn="sync")
    kinds = {type(m).__name__ for m in built.modules() if "BatchNorm" in type(m).__name__}
    assert kinds
    assert all("Sync" in kind for kind in kinds)
