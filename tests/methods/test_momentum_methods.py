"""MoCo and MoCo v3, whose keys come from a momentum encoder."""

import math

import pytest
import torch
from small_methods import ALL, filled, make, predictor, views
from torch import nn

from twoview.backbones import create_backbone
from twoview.heads import projection_head
from twoview.losses import info_nce, moco_v3_loss
from twoview.methods import MoCo, MoCoV3

IDS = torch.arange(8)


@pytest.mark.parametrize("method", [MoCo, MoCoV3])
def test_the_key_encoder_starts_equal_head_included_and_gets_no_gradient(method):
    built = make(method, **ALL[method])
    ours, keys = nn.Sequential(built.backbone, built.head), built.key_encoder
    assert len(list(keys.parameters())) == len(list(ours.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(keys.parameters(), ours.parameters(), strict=True))
    built(*views(), ids=IDS).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in keys.parameters())
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize(("method", "end"), [(MoCo, None), (MoCo, 1.0), (MoCoV3, 1.0)])
def test_the_momentum_follows_a_half_cosine_to_its_end(method, end):
    built = make(method, momentum=0.6, **({} if end is None else {"momentum_end": end}), **ALL[method])
    ours = nn.Sequential(built.backbone, built.head)
    for progress in (0.0, 0.5, 1.0):
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = [p.clone() for p in built.key_encoder.parameters()]
        built.after_update(progress)
        m = 0.6 if end is None else end - (end - 0.6) * (math.cos(math.pi * progress) + 1) / 2
        for key, old, own in zip(built.key_encoder.parameters(), before, ours.parameters(), strict=True):
            torch.testing.assert_close(key, m * old + (1 - m) * own)


def test_moco_is_the_papers_pseudocode():
    built = make(MoCo, queue_size=10, temperature=0.2)
    built.queue.push(torch.randn(7, 16), torch.tensor([3, 50, 51, 52, 53, 0, 54]))
    view_a, view_b = views()
    step = built(view_a, view_b, ids=IDS)
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
    assert step.chance == pytest.approx((6 * math.log(8) + 2 * math.log(7)) / 8)
    built.after_batch(step)
    assert sorted(built.queue.read()[1].tolist()) == sorted([0, 54, *range(8)])  # the oldest are gone


def test_moco_symmetric_is_both_directions_and_pushes_both():
    built = make(MoCo, queue_size=64, symmetric=True)
    built.queue.push(torch.randn(9, 16), torch.arange(20, 29))
    view_a, view_b = views()
    step = built(view_a, view_b, ids=IDS)
    queue, _ = built.queue.read()
    there, back = (
        info_nce(built.head(built.backbone(a)), built.key_encoder(b), queue, 0.2)
        for a, b in ((view_a, view_b), (view_b, view_a))
    )
    torch.testing.assert_close(step.loss, (there + back) / 2)
    built.after_batch(step)
    assert len(built.queue) == 25


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("dclw", {"sigma": 2.0}),
        ("debiased", {"tau_plus": 0.02}),
        ("hard", {"tau_plus": 0.02}),
        ("hard", {"beta": 0.3}),
    ],
)
def test_parameters_of_the_variants_reach_the_loss_of_moco(variant, parameters):
    method = filled(make(MoCo, queue_size=16, variant=variant, **parameters))
    default = filled(make(MoCo, queue_size=16, variant=variant))
    encoded = method.encode(*views())
    keys, ids = method.queue.read()
    same = IDS[:, None] == ids
    (q,), (k,) = encoded.embeddings, encoded.targets
    loss = method.loss(encoded, IDS).loss
    torch.testing.assert_close(loss, info_nce(q, k, keys, 0.2, variant=variant, same=same, **parameters))
    assert (loss - default.loss(encoded, IDS).loss).abs() > 1e-4


def test_moco_without_ids_is_an_error():
    with pytest.raises(ValueError, match="ids"):
        make(MoCo)(*views())


def test_moco_v3_is_its_loss_of_views_encoded_separately():
    built = make(MoCoV3, predictor=predictor, temperature=0.3)
    step = built(*views())
    q_a, q_b = (built.predictor(built.head(built.backbone(view))) for view in views())
    k_a, k_b = (built.key_encoder(view) for view in views())
    torch.testing.assert_close(step.loss, moco_v3_loss(q_a, k_b, q_b, k_a, 0.3))
    assert step.chance == pytest.approx(4 * 0.3 * math.log(8))


def test_a_frozen_patch_embedding_stays():
    torch.manual_seed(0)
    backbone, width = create_backbone("test_vit", image_size=32)
    built = MoCoV3(backbone, projection_head(width, 32, 16), predictor, freeze_patch_embedding=True)
    built(*views()).loss.backward()
    assert all(p.grad is None for p in built.backbone.patch_embed.parameters())
    assert built.backbone.blocks[0].attn.qkv.weight.grad is not None
