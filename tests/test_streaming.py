"""The losses block by block: equal to those of a whole similarity matrix, which is never held."""

from functools import partial

import plain_losses
import pytest
import torch
from largest_tensor import largest_tensor
from test_losses import pair
from torch.testing import assert_close

from twoview import losses, streaming
from twoview.variants import VARIANTS

IDS = torch.tensor([3, 0, 3, 1, -1, 0, 2, -1, 3, 4, 5])
N = len(IDS)


@pytest.fixture(params=["one block", "blocks of 4 rows"])
def blocks(request, monkeypatch):
    """All rows together, or in several blocks of which the last one is smaller."""
    if request.param != "one block":
        monkeypatch.setattr(streaming, "CPU_BLOCK", 1)
        monkeypatch.setattr(streaming, "FEWEST_ROWS", 4)


def value_and_gradients(loss, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def known(ids, others):
    return (ids[:, None] == others) & (ids >= 0)[:, None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options", [{}, {"same": True}, {"mask_above": 0.5}, {"same": True, "mask_above": 0.5}], ids=str
)
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["64", "32"])
def test_losses_and_gradients_equal_those_of_the_whole_matrix(blocks, variant, options, dtype, accuracy):
    z_a, z_b, bank = torch.randn(3, 11, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    bank = torch.cat([bank, bank[:9] + 1])
    others = torch.cat([IDS, IDS[:9]])
    ours, plain = dict(options), dict(options)
    for_queue, plain_queue = dict(options), dict(options)
    if "same" in options:
        ours["same"], plain["same"] = IDS, known(IDS, IDS)
        for_queue["same"], plain_queue["same"] = (IDS, others), known(IDS, others)
    in_batch = partial(losses.nt_xent, temperature=0.3, variant=variant, **ours)
    queue = partial(losses.info_nce, temperature=0.3, variant=variant, **for_queue)
    for loss, other, tensors in (
        (in_batch, partial(plain_losses.nt_xent, temperature=0.3, variant=variant, **plain), (z_a, z_b)),
        (queue, partial(plain_losses.info_nce, temperature=0.3, variant=variant, **plain_queue), (z_a, z_b, bank)),
    ):
        found = value_and_gradients(loss, *tensors)
        wanted = value_and_gradients(other, *(x.double() for x in tensors))
        for one, two in zip(found, wanted, strict=True):
            assert_close(one.double(), two, rtol=accuracy, atol=accuracy)


def test_a_mask_equals_ids(blocks):
    z_a, z_b = pair(N, 4)
    by_ids = value_and_gradients(partial(losses.nt_xent, temperature=0.2, same=IDS), z_a, z_b)
    by_mask = value_and_gradients(partial(losses.nt_xent, temperature=0.2, same=known(IDS, IDS)), z_a, z_b)
    assert all(torch.equal(one, two) for one, two in zip(by_ids, by_mask, strict=True))
    ids = (IDS, IDS.flip(0))
    by_ids = losses.info_nce(z_a, z_b, z_b, 0.2, same=ids)
    assert torch.equal(by_ids, losses.info_nce(z_a, z_b, z_b, 0.2, same=known(*ids)))


def test_sup_con_equals_that_of_the_whole_matrix(blocks):
    z_a, z_b = pair(N, 4)
    ours = value_and_gradients(lambda a, b: losses.sup_con(a, b, IDS, 0.2), z_a, z_b)
    plain = value_and_gradients(lambda a, b: plain_losses.sup_con(a, b, IDS, 0.2), z_a, z_b)
    for one, two in zip(ours, plain, strict=True):
        assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_pass_gradcheck(blocks, variant):
    z_a, z_b, bank = torch.randn(3, 9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = [x.requires_grad_() for x in (z_a, z_b, bank)]
    assert torch.autograd.gradcheck(lambda a, b: losses.nt_xent(a, b, 0.3, variant=variant), tensors[:2])
    same = (IDS[:9], IDS[2:])
    queue = partial(losses.info_nce, temperature=0.3, variant=variant, same=same)
    assert torch.autograd.gradcheck(queue, tensors)


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b, t: losses.nt_xent(a, b, t),
        lambda a, b, t: losses.nt_xent(a, b, t, variant="dclw"),
        lambda a, b, t: losses.info_nce(a, b, b.flip(0), t),
        lambda a, b, t: losses.clip_loss(a, b, t),
        lambda a, b, t: losses.sup_con(a, b, IDS[: len(a)], t),
    ],
)
def test_gradients_pass_gradcheck_with_a_learned_temperature(blocks, loss):
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (*(z.requires_grad_() for z in pair(9, 3)), temperature))


def test_the_gradient_of_the_queries_of_moco_v3_passes_gradcheck(blocks):
    q_a, k_b = pair(9, 3)
    q_b, k_a = (z.requires_grad_() for z in pair(9, 3, seed=1))
    q_a.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: losses.moco_v3_loss(a, k_b, b, k_a.detach(), 0.3), (q_a, q_b))


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b, rows: losses.nt_xent(a, b, 0.2, anchors=rows),
        lambda a, b, rows: losses.nt_xent(a, b, 0.2, anchors=rows, same=IDS, variant="dclw"),
        lambda a, b, rows: losses.nt_xent(a, b, 0.2, anchors=rows, same=known(IDS, IDS), variant="hard"),
        lambda a, b, rows: losses.batch_nce(a, b, 0.2, rows),
        lambda a, b, rows: losses.clip_loss(a, b, 0.2, rows),
        lambda a, b, rows: losses.moco_v3_loss(a, b, b, a, 0.2, rows),
        lambda a, b, rows: losses.sup_con(a, b, IDS, 0.2, rows),
    ],
)
def test_the_rows_of_several_processes_together_are_those_of_one(blocks, loss):
    z_a, z_b = pair(N, 4)
    whole = value_and_gradients(lambda a, b: loss(a, b, slice(None)), z_a, z_b)
    parts = [value_and_gradients(lambda a, b, r=rank: loss(a, b, slice(r, None, 3)), z_a, z_b) for rank in range(3)]
    weights = [len(range(rank, N, 3)) / N for rank in range(3)]
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        total = sum(weight * part for weight, part in zip(weights, several, strict=True))
        assert_close(one, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z_a, z_b, n: losses.nt_xent(z_a, z_b, 0.2, same=torch.arange(n) // 2, variant="hard"),
        lambda z_a, z_b, n: losses.info_nce(z_a, z_b, z_b, 0.2, same=(torch.arange(n), torch.arange(n))),
        lambda z_a, z_b, n: losses.moco_v3_loss(z_a, z_b, z_b, z_a, 0.2),
        lambda z_a, z_b, n: losses.clip_loss(z_a, z_b, 0.2),
        lambda z_a, z_b, n: losses.sup_con(z_a, z_b, torch.arange(n) // 2, 0.2),
    ],
)
def test_no_tensor_is_as_large_as_the_matrix(loss, monkeypatch):
    monkeypatch.setattr(streaming, "CPU_BLOCK", 2**14)
    monkeypatch.setattr(streaming, "FEWEST_ROWS", 4)
    n = 512
    z_a, z_b = (z.requires_grad_() for z in pair(n, 8, torch.float32))
    largest = largest_tensor(lambda: loss(z_a, z_b, n).backward())
    assert largest == 2**14


def test_a_second_derivative_is_refused():
    z_a, z_b = (z.requires_grad_() for z in pair(4, 3))
    with pytest.raises(RuntimeError, match="create_graph=True is not possible"):
        torch.autograd.grad(losses.nt_xent(z_a, z_b, 0.2), z_a, create_graph=True)


def test_the_gradient_is_scaled_as_autograd_asks():
    z_a, z_b = pair(6, 3)
    once = value_and_gradients(lambda a, b: losses.nt_xent(a, b, 0.2), z_a, z_b)
    twice = value_and_gradients(lambda a, b: 2 * losses.nt_xent(a, b, 0.2) + losses.nt_xent(b, a, 0.2), z_a, z_b)
    assert all(torch.allclose(3 * one, two, rtol=1e-12) for one, two in zip(once, twice, strict=True))


def test_without_gradient_the_value_is_the_same():
    z_a, z_b = (z.requires_grad_() for z in pair(6, 3))
    with torch.no_grad():
        value = losses.nt_xent(z_a, z_b, 0.2)
    assert not value.requires_grad
    assert torch.equal(value, losses.nt_xent(z_a, z_b, 0.2).detach())
    assert not losses.nt_xent(z_a.detach(), z_b.detach(), 0.2).requires_grad


def test_bf16_products_change_a_similarity_by_at_most_a_hundredth():
    z_a, z_b = pair(64, 128, torch.float32)
    for width, limit in ((2, 0.012), (8, 0.012), (128, 0.004)):
        u = losses.l2_normalize(torch.randn(2048, width, generator=torch.Generator().manual_seed(0)))
        for temperature in (0.07, 0.1, 0.3):
            logits = streaming._logits(u / temperature, u.bfloat16(), streaming.Rows(loss=None), slice(0, 2048))
            assert (logits * temperature - u @ u.T).abs().max() <= limit
    for temperature in (0.1, 0.5):
        ours = losses.nt_xent(z_a, z_b + 2 * z_a, temperature, products="bf16")
        exact = losses.nt_xent(z_a, z_b + 2 * z_a, temperature)
        assert not torch.equal(ours, exact)
        assert abs(ours - exact) <= 0.004 / temperature


@pytest.mark.parametrize("mask_above", [0, 1, -0.5, 2, float("nan"), "0.5"])
def test_a_limit_out_of_range_is_refused(mask_above):
    with pytest.raises(ValueError, match=f"^mask_above={mask_above}: must lie between 0 and 1"):
        losses.nt_xent(*pair(4, 3), 0.2, mask_above=mask_above)


def test_unknown_products_are_refused():
    with pytest.raises(ValueError, match=r"^products=fp8: choose bf16"):
        losses.nt_xent(*pair(4, 3), 0.2, products="fp8")


def test_equal_ids_are_counted():
    ids, others = torch.tensor([3, -1, 0, 7]), torch.tensor([3, 0, 3, -1, 5])
    assert streaming.count_equal(ids, others).tolist() == known(ids, others).sum(1).tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize(
    ("same", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"same must be int \[4\] or boolean \[4, 4\], not torch.int64 \[3\]"),
        (torch.zeros(4, 4, dtype=torch.int64), r"not torch.int64 \[4, 4\]"),
        (torch.zeros(4), r"not torch.float32 \[4\]"),
    ],
)
def test_known_positives_of_another_shape_are_refused(same, message):
    with pytest.raises(ValueError, match=message):
        losses.nt_xent(*pair(4, 3), 0.2, same=same)


@pytest.mark.parametrize("same", [torch.zeros(4, 4).bool(), torch.zeros(4, 5), (torch.arange(4), torch.arange(4))])
def test_known_keys_of_another_shape_are_refused(same):
    with pytest.raises(ValueError, match=r"^same must be"):
        losses.info_nce(*pair(4, 3), pair(5, 3)[0], 0.2, same=same)


@pytest.mark.parametrize("variant", ["debiased", "hard"])
def test_a_learned_temperature_is_refused_where_its_gradient_would_be_wrong(variant):
    with pytest.raises(ValueError, match="cannot be learned"):
        losses.nt_xent(*pair(4, 3), torch.tensor(0.2, requires_grad=True), variant=variant)
