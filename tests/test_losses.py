import math

import pytest
import torch
from torch.testing import assert_close

from twoview.losses import (
    batch_nce,
    chance_level,
    clip_loss,
    info_nce,
    l2_normalize,
    moco_v3_loss,
    nt_xent,
    sup_con,
)
from twoview.variants import VARIANTS, check_loss_arguments


def pair(n, d, dtype=torch.float64, seed=0):
    return torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def nt_xent_by_hand(z_a, z_b, temperature):
    """Algorithm 1 of the SimCLR paper in plain loops."""
    z = [v / v.norm() for v in torch.cat([z_a, z_b])]
    n, total = len(z_a), 0.0
    for i in range(2 * n):
        denominator = sum(math.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(z[i] @ z[(i + n) % (2 * n)] / temperature) / denominator)
    return total / (2 * n)


def rows_by_hand(positive, negatives, temperature, variant, sigma=0.5, tau_plus=0.1, beta=1.0):
    """Losses of rows from cosine similarities: the formulas of the papers with exp and log."""
    weights = [math.exp(p / sigma) for p in positive]
    losses = []
    for p, row in zip(positive, negatives, strict=True):
        pos, neg = math.exp(p / temperature), [math.exp(s / temperature) for s in row]
        if not neg:
            losses.append(0.0)
        elif variant == "infonce":
            losses.append(-math.log(pos / (pos + sum(neg))))
        elif variant == "dcl":
            losses.append(-p / temperature + math.log(sum(neg)))
        elif variant == "dclw":
            weight = 2 - math.exp(p / sigma) / (sum(weights) / len(weights))
            losses.append(-weight * p / temperature + math.log(sum(neg)))
        else:
            importance = [x**beta if variant == "hard" else 1.0 for x in neg]
            mean = sum(i * x for i, x in zip(importance, neg, strict=True)) / sum(importance)
            g = max((mean - tau_plus * pos) / (1 - tau_plus), math.exp(-1 / temperature))
            losses.append(-math.log(pos / (pos + len(neg) * g)))
    return losses


@pytest.mark.parametrize(("n", "d", "temperature"), [(2, 3, 0.5), (7, 5, 0.1), (16, 32, 0.07)])
def test_nt_xent_is_algorithm_1(n, d, temperature):
    z_a, z_b = pair(n, d)
    assert_close(nt_xent(z_a, z_b, temperature).item(), nt_xent_by_hand(z_a, z_b, temperature), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_variants_are_the_papers_formulas(variant, temperature):
    z_a, z_b = pair(6, 4, seed=1)
    z = torch.nn.functional.normalize(torch.cat([z_a, z_b]), dim=1)
    positive = [float(z[i] @ z[(i + 6) % 12]) for i in range(12)]
    negatives = [[float(z[i] @ z[k]) for k in range(12) if k % 6 != i % 6] for i in range(12)]
    expected = rows_by_hand(positive, negatives, temperature, variant)
    assert_close(nt_xent(z_a, z_b, temperature, variant=variant).item(), sum(expected) / 12, rtol=1e-10, atol=0)

    bank = pair(9, 4, seed=2)[0]
    n_bank = torch.nn.functional.normalize(bank, dim=1)
    expected = rows_by_hand(
        [float(z[i] @ z[i + 6]) for i in range(6)], [(z[i] @ n_bank.T).tolist() for i in range(6)], temperature, variant
    )
    assert_close(info_nce(z_a, z_b, bank, temperature, variant=variant).item(), sum(expected) / 6, rtol=1e-10, atol=0)


def test_known_positives_are_not_negatives():
    z_a, z_b = pair(5, 4)
    ids = torch.tensor([0, 1, 0, 2, 1])
    z = torch.nn.functional.normalize(torch.cat([z_a, z_b]), dim=1)
    ids_2 = ids.repeat(2).tolist()
    expected = rows_by_hand(
        [float(z[i] @ z[(i + 5) % 10]) for i in range(10)],
        [[float(z[i] @ z[k]) for k in range(10) if ids_2[i] != ids_2[k]] for i in range(10)],
        0.2,
        "infonce",
    )
    loss = nt_xent(z_a, z_b, 0.2, same=ids)
    assert_close(loss.item(), sum(expected) / 10, rtol=1e-10, atol=0)
    assert_close(nt_xent(z_a, z_b, 0.2, same=ids[:, None] == ids[None]), loss)
    masked = info_nce(z_a, z_b, z_b, 0.2, same=torch.eye(5, dtype=torch.bool))
    expected = [info_nce(z_a[i : i + 1], z_b[i : i + 1], torch.cat([z_b[:i], z_b[i + 1 :]]), 0.2) for i in range(5)]
    assert_close(masked, torch.stack(expected).mean())


def test_negative_ids_are_unknown_and_equal_to_no_other():
    z_a, z_b = pair(5, 4)
    loss = nt_xent(z_a, z_b, 0.2, same=torch.tensor([-1, 3, -1, 3, -2]))
    assert torch.equal(loss, nt_xent(z_a, z_b, 0.2, same=torch.tensor([0, 3, 1, 3, 2])))
    assert torch.equal(nt_xent(z_a, z_b, 0.2, same=torch.full((5,), -1)), nt_xent(z_a, z_b, 0.2))


def test_closed_forms():
    same = torch.ones(4, 3)
    assert_close(nt_xent(same, same, 0.3).item(), math.log(7), rtol=1e-6, atol=0)
    eye = torch.eye(4)  # positives at cosine 1, negatives at 0
    assert_close(nt_xent(eye, eye, 0.5).item(), math.log(1 + 6 * math.exp(-2)), rtol=1e-6, atol=0)
    assert_close(nt_xent(eye, eye, 0.02).item(), 0.0, rtol=0, atol=1e-6)


def test_variants_are_equal_in_the_limits_stated_in_the_papers():
    z_a, z_b = pair(8, 4)
    plain = nt_xent(z_a, z_b, 0.2)
    assert_close(nt_xent(z_a, z_b, 0.2, variant="debiased", tau_plus=0.0), plain)
    assert_close(nt_xent(z_a, z_b, 0.2, variant="hard", tau_plus=0.0, beta=0.0), plain)
    debiased = nt_xent(z_a, z_b, 0.2, variant="debiased")
    assert_close(nt_xent(z_a, z_b, 0.2, variant="hard", beta=0.0), debiased)
    assert_close(nt_xent(z_a, z_b, 0.2, variant="dclw", sigma=1e9), nt_xent(z_a, z_b, 0.2, variant="dcl"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_value_and_gradient_are_finite(variant, temperature, dtype):
    z_a, z_b = (z.detach().requires_grad_() for z in pair(8, 16, dtype))
    with torch.no_grad():
        z_a[0] = 0  # a zero vector
        z_b[0] = 0
        z_a[1] = 0
        z_a[2] *= 100
        z_b[3] = z_a[3]
        z_b[4] = -z_a[4]
    loss = nt_xent(z_a, z_b, temperature, variant=variant) + info_nce(
        z_a, z_b, z_b.detach()[:5], temperature, variant=variant
    )
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.isfinite()
    assert z_a.grad.isfinite().all()
    assert z_b.grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_without_negatives_has_no_loss_and_no_gradient(variant):
    z_a, z_b = (z.requires_grad_() for z in pair(3, 4))
    equal_ids = torch.zeros(3, dtype=torch.long)
    for loss in (
        nt_xent(z_a, z_b, 0.1, variant=variant, same=equal_ids),
        nt_xent(z_a[:1], z_b[:1], 0.1, variant=variant),
        info_nce(z_a, z_b, z_b[:0], 0.1, variant=variant),
    ):
        z_a.grad = None
        loss.backward()
        assert loss.item() == 0
        assert not z_a.grad.any()


def test_autocast_changes_nothing():
    z_a, z_b = pair(32, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(z_a, z_b, 0.05)
    assert torch.equal(inside, nt_xent(z_a, z_b, 0.05))


def test_small_temperature_equals_high_precision():
    z_a, z_b = pair(16, 8)
    for temperature in (1e-3, 5e-3):
        exact = nt_xent(z_a, z_b, temperature)
        assert_close(nt_xent(z_a.float(), z_b.float(), temperature).double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_a_temperature_out_of_range_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        nt_xent(*pair(4, 3), temperature)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[5, 3\]"):
        nt_xent(torch.ones(4, 3), torch.ones(5, 3), 0.1)
    with pytest.raises(ValueError, match="info_nce needs"):
        info_nce(torch.ones(4, 3), torch.ones(4, 3), torch.ones(5, 2), 0.1)
    with pytest.raises(ValueError, match="variant"):
        nt_xent(*pair(4, 3), 0.1, variant="dlc")


def test_parameters_of_variants_reach_both_losses_and_unknown_ones_are_refused():
    z_a, z_b = (l2_normalize(z) for z in pair(6, 4, seed=1))
    bank = l2_normalize(pair(9, 4, seed=2)[0])
    for variant, knobs in {"dclw": {"sigma": 0.3}, "debiased": {"tau_plus": 0.2}, "hard": {"beta": 0.5}}.items():
        positive, negatives = (z_a * z_b).sum(1).tolist(), (z_a @ bank.T).tolist()
        expected = sum(rows_by_hand(positive, negatives, 0.2, variant, **knobs)) / 6
        assert_close(info_nce(z_a, z_b, bank, 0.2, variant=variant, **knobs).item(), expected, rtol=1e-10, atol=0)
        assert not torch.equal(
            nt_xent(z_a, z_b, 0.2, variant=variant, **knobs), nt_xent(z_a, z_b, 0.2, variant=variant)
        )
    for loss in (nt_xent, lambda *a, **k: info_nce(*a[:2], bank[:0], *a[2:], **k)):
        with pytest.raises(TypeError, match="gamma"):
            loss(z_a, z_b, 0.2, variant="hard", gamma=0.5)


@pytest.mark.parametrize(
    "knobs",
    [{"temperature": 0}, {"variant": "dlc"}, {"sigma": 0.0}, {"tau_plus": 1.0}, {"tau_plus": -0.1}, {"beta": math.nan}],
)
def test_arguments_out_of_range_are_named(knobs):
    name, value = next(iter(knobs.items()))
    with pytest.raises(ValueError, match=f"^{name}={value}: "):
        check_loss_arguments(**{"temperature": 0.1} | knobs)
    with pytest.raises(ValueError, match=f"^{name}={value}: "):
        info_nce(*pair(2, 3), torch.ones(0, 3), **{"temperature": 0.1} | knobs)


def test_chance_level_is_the_loss_of_uninformative_embeddings():
    same = torch.ones(8, 3)
    assert_close(nt_xent(same, same, 0.1).item(), chance_level(14), rtol=1e-6, atol=0)
    assert_close(nt_xent(same, same, 0.1, variant="dcl").item(), chance_level(14, "dcl"), rtol=1e-5, atol=0)
    assert_close(chance_level(torch.tensor([3, 7])).item(), (math.log(4) + math.log(8)) / 2)


def rows_of_a_batch_by_hand(q, k, temperature):
    """ctr() of MoCo v3's Algorithm 1 without its factor: cross-entropy of each row against the diagonal."""
    q, k = (x / x.norm(dim=1, keepdim=True) for x in (q, k))
    total = 0.0
    for i in range(len(q)):
        logits = [math.exp(q[i] @ k[j] / temperature) for j in range(len(k))]
        total -= math.log(logits[i] / sum(logits))
    return total / len(q)


def test_losses_within_a_batch_are_the_papers_pseudocode():
    a, b = pair(7, 5)
    c, d = pair(7, 5, seed=3)
    a_to_b, c_to_d = rows_of_a_batch_by_hand(a, b, 0.3), rows_of_a_batch_by_hand(c, d, 0.3)
    assert_close(batch_nce(a, b, 0.3).item(), a_to_b, rtol=1e-12, atol=0)
    assert_close(moco_v3_loss(a, b, c, d, 0.3).item(), 0.6 * (a_to_b + c_to_d), rtol=1e-12, atol=0)
    columns = rows_of_a_batch_by_hand(b, a, 0.3)
    assert_close(clip_loss(a, b, 0.3).item(), (a_to_b + columns) / 2, rtol=1e-12, atol=0)


def test_moco_v3_keys_take_no_gradient_and_clip_has_it_on_both_sides():
    tensors = [x.requires_grad_() for x in (*pair(4, 3), *pair(4, 3, seed=1))]
    moco_v3_loss(*tensors, 0.2).backward()
    assert [t.grad is not None for t in tensors] == [True, False, True, False]
    a, b = (x.requires_grad_() for x in pair(4, 3))
    clip_loss(a, b, 0.2).backward()
    assert a.grad.abs().max() > 0
    assert b.grad.abs().max() > 0


def sup_con_by_hand(z_a, z_b, labels, temperature):
    """L_out of the SupCon paper, eq. 2, in plain loops."""
    z = [v / v.norm() for v in torch.cat([z_a, z_b])]
    n, total = len(z_a), 0.0
    for i in range(2 * n):
        denominator = sum(math.exp(z[i] @ z[j] / temperature) for j in range(2 * n) if j != i)
        label = labels[i % n]
        positives = [j for j in range(2 * n) if j != i and (j % n == i % n or (label >= 0 and labels[j % n] == label))]
        total -= sum(math.log(math.exp(z[i] @ z[j] / temperature) / denominator) for j in positives) / len(positives)
    return total / (2 * n)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2], [-1, -1, 0, 0, 0], [0, 0, 0, 0, 0], [-1, -1, -1, -1, -1]])
def test_sup_con_is_equation_2(labels):
    z_a, z_b = pair(5, 4)
    expected = sup_con_by_hand(z_a, z_b, labels, 0.1)
    assert_close(sup_con(z_a, z_b, torch.tensor(labels), 0.1).item(), expected, rtol=1e-12, atol=0)


def test_sup_con_of_different_labels_is_nt_xent():
    z_a, z_b = pair(6, 4)
    assert_close(sup_con(z_a, z_b, torch.arange(6), 0.1), nt_xent(z_a, z_b, 0.1))


@pytest.mark.parametrize("temperature", [1e-3, 0.02, 1.0])
def test_other_losses_are_finite_at_small_temperatures_and_zero_vectors(temperature):
    a, b = (x.float() for x in pair(6, 4))
    a[0] = 0
    for loss in (
        lambda x: sup_con(x, b, torch.tensor([0, 0, 1, 1, -1, -1]), temperature),
        lambda x: moco_v3_loss(x, b, b, x, temperature),
        lambda x: clip_loss(x, b, temperature),
    ):
        x = a.clone().requires_grad_()
        value = loss(x)
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite().all()


def test_info_nce_of_perfect_pairs_is_zero_unless_the_queue_contains_their_keys():
    keys = torch.eye(8, dtype=torch.float64)
    far = -torch.eye(8, dtype=torch.float64)
    assert info_nce(keys, keys, far, 0.02).item() < 1e-12
    # With the keys of the batch in the queue, the loss is at least log 2.
    assert info_nce(keys, keys, torch.cat([far, keys]), 0.02).item() > math.log(2) - 1e-9


def test_other_losses_refuse_wrong_shapes_and_temperatures():
    a, b = pair(4, 3)
    with pytest.raises(ValueError, match="batch_nce needs two"):
        batch_nce(a, b[:3], 0.1)
    with pytest.raises(ValueError, match="sup_con needs labels"):
        sup_con(a, b, torch.arange(3), 0.1)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            sup_con(a, b, torch.arange(4), bad)
        with pytest.raises(ValueError, match="temperature"):
            batch_nce(a, b, bad)
