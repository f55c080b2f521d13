import math

import pytest
import torch
from torch.testing import assert_close

from twoview.losses import VARIANTS, chance_level, info_nce, nt_xent


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
    """Losses of rows from cosines, written from the papers' formulas with exp and log."""
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


def test_known_positives_are_no_negatives():
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


def test_closed_forms():
    same = torch.ones(4, 3)
    assert_close(nt_xent(same, same, 0.3).item(), math.log(7), rtol=1e-6, atol=0)
    eye = torch.eye(4)  # positives at cosine 1, negatives at 0
    assert_close(nt_xent(eye, eye, 0.5).item(), math.log(1 + 6 * math.exp(-2)), rtol=1e-6, atol=0)
    assert_close(nt_xent(eye, eye, 0.02).item(), 0.0, rtol=0, atol=1e-6)


def test_variants_meet_where_the_papers_say():
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


# The weight of "dclw" is held constant in the gradient on purpose.
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "dclw"])
def test_gradient_is_the_derivative(variant):
    z_a, z_b = (z.requires_grad_() for z in pair(4, 3))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3, variant=variant), (z_a, z_b))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_without_negatives_has_no_loss_and_no_gradient(variant):
    z_a, z_b = (z.requires_grad_() for z in pair(3, 4))
    everything_alike = torch.zeros(3, dtype=torch.long)
    for loss in (
        nt_xent(z_a, z_b, 0.1, variant=variant, same=everything_alike),
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
def test_a_temperature_that_means_nothing_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        nt_xent(*pair(4, 3), temperature)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[5, 3\]"):
        nt_xent(torch.ones(4, 3), torch.ones(5, 3), 0.1)
    with pytest.raises(ValueError, match="info_nce needs"):
        info_nce(torch.ones(4, 3), torch.ones(4, 3), torch.ones(5, 2), 0.1)
    with pytest.raises(ValueError, match="variant"):
        nt_xent(*pair(4, 3), 0.1, variant="dlc")


def test_chance_is_the_loss_of_embeddings_that_say_nothing():
    same = torch.ones(8, 3)
    assert_close(nt_xent(same, same, 0.1).item(), chance_level(14), rtol=1e-6, atol=0)
    assert_close(nt_xent(same, same, 0.1, variant="dcl").item(), chance_level(14, "dcl"), rtol=1e-5, atol=0)
    assert_close(chance_level(torch.tensor([3, 7])), (math.log(4) + math.log(8)) / 2)
