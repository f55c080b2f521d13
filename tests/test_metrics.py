import math

import pytest
import torch
from largest_tensor import largest_tensor
from sklearn.neighbors import KNeighborsClassifier
from torch.testing import assert_close

from twoview import metrics


def test_alignment_and_uniformity_are_the_papers_loops():
    z_a, z_b = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    u_a, u_b = (torch.nn.functional.normalize(z, dim=1) for z in (z_a, z_b))
    expected = sum(float((u_a[i] - u_b[i]).norm() ** 2) for i in range(9)) / 9
    assert metrics.alignment(z_a, z_b) == pytest.approx(expected, rel=1e-5)
    pairs = [math.exp(-2 * float((u_a[i] - u_a[j]).norm() ** 2)) for i in range(9) for j in range(i)]
    assert metrics.uniformity(z_a) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert metrics.alignment(z_a, z_a) == 0
    assert metrics.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_orthogonal_groups_is_their_number(rank):
    z = torch.zeros(120, 8)
    z[torch.arange(120), torch.arange(120) % rank] = 1
    assert metrics.effective_rank(z) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_is_rankme_of_the_paper():
    z = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:, 5:] = 0
    s = torch.linalg.svdvals(z)
    p = [float(x / s.sum()) + 1e-7 for x in s]
    assert metrics.effective_rank(z) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-12)


def test_effective_rank_of_zeros_is_zero():
    assert metrics.effective_rank(torch.zeros(4, 3)) == 0


def test_feature_std():
    z = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    assert metrics.feature_std(z) == pytest.approx(1, abs=0.01)
    assert metrics.feature_std(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)


def test_contrastive_logs_against_loops():
    z_a, z_b = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(3))
    z_b = z_a + 0.5 * z_b
    u = torch.nn.functional.normalize(torch.cat([z_a, z_b]), dim=1)
    hits, negatives = 0, []
    for i in range(6):
        row = [float(u[i] @ u[k]) for k in range(12) if k % 6 != i]
        hits += float(u[i] @ u[i + 6]) > max(row)
        negatives += row
    logs = metrics.in_batch_logs(z_a, z_b)
    assert float(logs["contrastive_top1"]) == pytest.approx(hits / 6)
    assert float(logs["negative_similarity"]) == pytest.approx(sum(negatives) / len(negatives), abs=1e-6)
    positive = sum(float(u[i] @ u[i + 6]) for i in range(6)) / 6
    assert float(logs["positive_similarity"]) == pytest.approx(positive, abs=1e-6)


def test_ties_do_not_count_for_contrastive_top1():
    same = torch.ones(4, 3)
    assert float(metrics.in_batch_logs(same, same)["contrastive_top1"]) == 0


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.05), (20, 1.0)])
def test_knn_equals_scikit_learn_with_the_same_weights(k, temperature):
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60, 6, generator=generator), torch.randn(25, 6, generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator)
    reference = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: torch.exp((1 - torch.tensor(distance)) / temperature).numpy(),
    )
    expected = reference.fit(bank.numpy(), labels.numpy()).predict(queries.numpy())
    assert_close(metrics.knn_predict(bank, labels, queries, k, temperature), torch.from_numpy(expected))


def test_knn_accepts_k_above_the_bank_size_and_small_temperatures():
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert metrics.knn_predict(bank, labels, bank + 0.1, k=200, temperature=1e-3).tolist() == [0, 1, 2]


def test_knn_does_not_depend_on_the_chunk_size():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    for a, b in zip(metrics.knn_neighbors(x, x, 5, chunk=7), metrics.knn_neighbors(x, x, 5), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(("bank", "k"), [(70_000, 7), (66_000, 300), (65_700, 66_000), (66_000, 66_000), (5000, 5)])
def test_blocks_of_the_bank_give_the_neighbors_of_one_whole_ranking(bank, k):
    generator = torch.Generator().manual_seed(0)
    x, queries = torch.randn(bank, 6, generator=generator), torch.randn(5, 6, generator=generator)
    whole = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(x, dim=1).T
    expected = whole.sort(1, descending=True).values[:, :k]
    similarity, position = metrics.knn_neighbors(x, queries, k, chunk=2)
    assert_close(similarity, expected, rtol=0, atol=1e-6)
    assert_close(whole.gather(1, position), similarity, rtol=0, atol=1e-6)
    assert all(len(set(row.tolist())) == expected.shape[1] for row in position)


def test_of_many_equal_vectors_any_are_neighbors_but_never_a_less_similar_one():
    x = torch.eye(2).repeat(40_000, 1)  # even positions equal the query
    similarity, position = metrics.knn_neighbors(x, torch.tensor([[1.0, 0.0]]), 150)
    assert (similarity == 1).all()
    assert (position % 2 == 0).all()
    assert len(position.unique()) == 150


@pytest.mark.parametrize("n", [2049, 5000])
def test_blocks_of_pairs_give_the_uniformity_of_all_pairs(n):
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    u = torch.nn.functional.normalize(z.double(), dim=1)
    squared = 2 - 2 * u @ u.T
    pairs = squared[torch.ones_like(squared, dtype=torch.bool).triu(1)]
    assert metrics.uniformity(z) == pytest.approx(float((-2 * pairs).exp().mean().log()), rel=1e-5)


@pytest.mark.parametrize("n", [8192, 8193, 20_000])
def test_the_gram_matrix_of_many_rows_gives_the_effective_rank_of_their_singular_values(n):
    z = torch.randn(n, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -4, 20)
    s = torch.linalg.svdvals(z.double())
    p = s / s.sum() + 1e-7
    assert metrics.effective_rank(z) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-5)
    assert metrics.effective_rank(torch.zeros(n, 3)) == 0


def test_votes_of_many_queries_are_those_of_each_query():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(5000, 9, generator=generator).sort(1, descending=True).values
    labels = torch.randint(0, 4, (5000, 9), generator=generator)
    found = metrics.knn_vote(similarity, labels, 7, 0.1, 4)
    for row in (0, 4095, 4096, 4999):
        votes = [
            sum(float(s) for s, c in zip((similarity[row] / 0.1).exp()[:7], labels[row], strict=False) if c == k)
            for k in range(4)
        ]
        assert int(found[row]) == votes.index(max(votes))


def test_no_tensor_grows_with_the_number_of_pairs():
    x = torch.randn(70_000, 4, generator=torch.Generator().manual_seed(0))
    assert largest_tensor(lambda: x @ x[:2000].T) == 140_000_000
    assert largest_tensor(lambda: metrics.knn_neighbors(x, x[:3000], 3)) <= 512 * 65_536
    assert largest_tensor(lambda: metrics.uniformity(x[:6000])) <= 2048**2
    assert largest_tensor(lambda: metrics.effective_rank(x)) <= 8192 * 4
