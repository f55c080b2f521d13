"""SimCLR, SupCon and NNCLR, whose negatives are the other images of the batch."""

import math

import pytest
import torch
from small_methods import ALL, make, views

from twoview.losses import batch_nce, nt_xent, sup_con
from twoview.methods import NNCLR, SimCLR, SupCon

LABELS = torch.tensor([0, 0, 1, -1, 1, 0, -1, 2])


def test_simclr_is_one_pass_and_nt_xent():
    method = make(SimCLR, temperature=0.3)
    view_a, view_b = views()
    step = method(view_a, view_b)
    features = method.backbone(torch.cat([view_a, view_b]))
    expected = nt_xent(*method.head(features).chunk(2), 0.3)
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.features, features[:8])
    assert not step.features.requires_grad
    assert not any(z.requires_grad for z in step.embeddings)
    assert step.chance == pytest.approx(math.log(15))


def test_simclr_takes_images_with_equal_labels_out_of_the_negatives():
    method = make(SimCLR, temperature=0.3, same="labels")
    encoded = method.encode(*views())
    step = method.loss(encoded, labels=LABELS)
    z = torch.nn.functional.normalize(torch.cat(encoded.embeddings), dim=1)
    total, negatives = 0.0, []
    for i in range(16):
        image, positive = i % 8, z[i] @ z[(i + 8) % 16]
        others = [j for j in range(16) if j % 8 != image and not LABELS[image] == LABELS[j % 8] >= 0]
        logits = torch.stack([positive, *(z[i] @ z[j] for j in others)]) / 0.3
        total += torch.nn.functional.cross_entropy(logits[None], torch.tensor([0]))
        negatives.append(len(others))
    torch.testing.assert_close(step.loss, total / 16)
    assert torch.equal(step.loss, nt_xent(*encoded.embeddings, 0.3, same=LABELS))
    assert step.chance == pytest.approx(sum(math.log(1 + n) for n in negatives) / 16)
    assert step.chance < math.log(15)
    assert step.loss < method.loss(encoded).loss  # there are fewer negatives


def test_simclr_without_labels_keeps_all_negatives():
    method, plain = make(SimCLR, same="labels"), make(SimCLR)
    encoded = plain.encode(*views())
    expected = plain.loss(encoded, labels=LABELS)
    for labels in (None, torch.full((8,), -1)):
        step = method.loss(encoded, labels=labels)
        assert torch.equal(step.loss, expected.loss)
        assert step.chance == pytest.approx(expected.chance)


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("dclw", {"sigma": 2.0}),
        ("debiased", {"tau_plus": 0.02}),
        ("hard", {"tau_plus": 0.02}),
        ("hard", {"beta": 0.3}),
    ],
)
def test_parameters_of_the_variants_reach_the_loss_of_simclr(variant, parameters):
    method, default = make(SimCLR, variant=variant, **parameters), make(SimCLR, variant=variant)
    encoded = method.encode(*views())
    loss = method.loss(encoded).loss
    assert torch.equal(loss, nt_xent(*encoded.embeddings, 0.5, variant=variant, **parameters))
    assert (loss - default.loss(encoded).loss).abs() > 1e-4


def test_supcon_is_its_loss_and_without_labels_simclr():
    method = make(SupCon, temperature=0.2)
    encoded = method.encode(*views())
    assert torch.equal(method.loss(encoded, labels=LABELS).loss, sup_con(*encoded.embeddings, LABELS, 0.2))
    torch.testing.assert_close(method(*views()).loss, make(SimCLR, temperature=0.2)(*views()).loss)


def test_nnclr_takes_the_nearest_stored_neighbor():
    built = make(NNCLR, **ALL[NNCLR])
    built.eval()
    stored = torch.randn(5, 16)
    built.support_set.push(stored, torch.arange(5))
    step = built(*views())
    z = built.head(built.backbone(torch.cat(views()))).chunk(2)
    p = [built.predictor(x) for x in z]
    near = [torch.stack([max(stored, key=lambda s, r=row: torch.cosine_similarity(s, r, 0)) for row in x]) for x in z]
    expected = (batch_nce(near[0], p[1], 0.1) + batch_nce(near[1], p[0], 0.1)) / 2
    torch.testing.assert_close(step.loss, expected)
    assert step.chance == pytest.approx(math.log(8))
    assert step.logs["queue_fill"] == 5 / 16
