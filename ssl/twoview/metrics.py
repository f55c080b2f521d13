"""What embeddings are like, as pure functions; none of them needs a gradient, all compute in at least fp32.

Shapes in names: N images, D embedding size, M stored vectors.
"""

import math

import torch
from torch import Tensor

from twoview.losses import unit_rows


@torch.no_grad()
def alignment(z_a: Tensor, z_b: Tensor) -> float:
    """Mean squared distance of positive pairs on the unit sphere, in [0, 4]; 0 is perfect.

    Wang & Isola 2020, arXiv:2005.10242, with alpha = 2.

    Args:
        z_a: ``[N, D]``.
        z_b: ``[N, D]``, row i of the same image as row i of ``z_a``.
    """
    return float((unit_rows(z_a) - unit_rows(z_b)).square().sum(1).mean())


@torch.no_grad()
def uniformity(z: Tensor) -> float:
    """Log of the mean Gaussian potential of all pairs on the unit sphere, in [-4, 0]; lower is more even.

    Wang & Isola 2020, arXiv:2005.10242, with t = 2.

    Args:
        z: ``[N, D]``, N >= 2.
    """
    u = unit_rows(z)
    squared = (2 - 2 * (u @ u.T)).clamp(min=0)
    pairs = torch.triu_indices(len(u), len(u), 1, device=u.device)
    values = -2 * squared[pairs[0], pairs[1]]
    return float(values.logsumexp(0) - math.log(len(values)))


@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """Exponential of the entropy of the singular values, in [1, min(N, D)]: RankMe.

    Garrido et al. 2023, arXiv:2210.02885, eq. 1. Wants at least 10 D rows, and compares runs of one method only.

    Args:
        z: ``[N, D]``, not centred.

    Returns:
        The rank, or 0 for all-zero embeddings.
    """
    z = z if z.dtype == torch.float64 else z.float()
    s = torch.linalg.svdvals(z)
    if float(s.sum()) == 0:
        return 0.0
    p = s / s.sum() + torch.finfo(s.dtype).tiny
    return float(torch.exp(-(p * p.log()).sum()))


@torch.no_grad()
def feature_std(z: Tensor) -> float:
    """Mean over dimensions of the deviation of unit-length rows, times sqrt(D): 1 when spread evenly, 0 collapsed.

    SimSiam, Chen & He 2021, arXiv:2011.10566, section 4.1.

    Args:
        z: ``[N, D]``, N >= 2.
    """
    return float(unit_rows(z).std(0).mean() * math.sqrt(z.shape[1]))


@torch.no_grad()
def contrastive_logs(positive: Tensor, similarity: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """How well rows tell their positive from their negatives, ready for a log.

    Args:
        positive: ``[N]`` cosine similarity of each row with its positive.
        similarity: ``[N, M]`` cosine similarities.
        valid: ``[N, M]`` boolean: which columns are negatives of the row.

    Returns:
        Scalars: ``contrastive_top1`` (share of rows whose positive beats every negative; a tie is a miss),
        ``positive_similarity`` and ``negative_similarity`` (mean cosines).
    """
    if not similarity.shape[1]:  # a queue that is still empty
        similarity, valid = similarity.new_zeros(len(positive), 1), valid.new_zeros(len(positive), 1)
    hardest = similarity.masked_fill(~valid, -math.inf).amax(1)
    return {
        "contrastive_top1": (positive > hardest).float().mean(),
        "positive_similarity": positive.mean(),
        "negative_similarity": (similarity * valid).sum() / valid.sum().clamp(min=1),
    }


@torch.no_grad()
def in_batch_logs(z_a: Tensor, z_b: Tensor, rows: int = 256) -> dict[str, Tensor]:
    """:func:`contrastive_logs` of first views against their partners and all other views of the batch.

    Args:
        z_a: ``[N, D]``.
        z_b: ``[N, D]``, row i of the same image as row i of ``z_a``.
        rows: how many first views are compared, which bounds the cost in large batches.
    """
    u_a, u_b = unit_rows(z_a), unit_rows(z_b)
    anchors = u_a[:rows]
    own = torch.eye(len(anchors), len(u_a), dtype=torch.bool, device=u_a.device)
    with torch.autocast(u_a.device.type, enabled=False):
        similarity = anchors @ torch.cat([u_a, u_b]).T
    return contrastive_logs((anchors * u_b[:rows]).sum(1), similarity, ~torch.cat([own, own], 1))


@torch.no_grad()
def recall_at_k(relevant: Tensor, k: int) -> float:
    """Share of queries with anything relevant among their first k results, in [0, 1].

    Recall@k of metric learning, Song et al. 2016, arXiv:1511.06452, section 6; elsewhere called hit rate.

    Args:
        relevant: boolean ``[N, M]``: for each query whether its results are relevant, best result first.
        k: >= 1.
    """
    return float(relevant[:, :k].any(1).double().mean())


@torch.no_grad()
def precision_at_k(relevant: Tensor, k: int) -> float:
    """Mean over queries of the share of their first k results that is relevant; see :func:`recall_at_k`."""
    return float(relevant[:, :k].double().sum(1).mean() / k)


@torch.no_grad()
def mean_reciprocal_rank(relevant: Tensor) -> float:
    """Mean of 1 / rank of the first relevant result, 0 where there is none; see :func:`recall_at_k`."""
    return float((relevant.any(1) / (relevant.int().argmax(1) + 1.0)).double().mean())


@torch.no_grad()
def mean_average_precision(relevant: Tensor) -> float:
    """Mean over queries of the mean precision at relevant results, 0 where there are none; see :func:`recall_at_k`."""
    found = relevant.cumsum(1, dtype=torch.int32)
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    precision = (found / ranks).masked_fill_(~relevant, 0).sum(1, dtype=torch.float64)
    return float((precision / relevant.sum(1).clamp(min=1)).mean())


@torch.no_grad()
def knn_neighbours(bank: Tensor, queries: Tensor, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The k most similar bank vectors of each query by cosine, most similar first.

    Args:
        bank: ``[M, D]``.
        queries: ``[N, D]``.
        k: neighbours, cut to M.
        chunk: queries compared at a time, which bounds memory to ``chunk * M`` similarities.

    Returns:
        Cosine similarities ``[N, k]`` and positions in the bank ``[N, k]`` (int64).
    """
    bank_MD = unit_rows(bank)
    parts = [(unit_rows(part) @ bank_MD.T).topk(min(k, len(bank)), dim=1) for part in queries.split(chunk)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


@torch.no_grad()
def knn_vote(similarity: Tensor, labels: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Classes by weighted vote of the k nearest neighbours, each vote weighing ``exp(cosine / temperature)``.

    Wu et al. 2018, arXiv:1805.01978, section 3.4.

    Args:
        similarity: ``[N, K]`` cosines, most similar first, K >= k or as many as the bank has.
        labels: ``[N, K]`` int64 classes of these neighbours.
        k: how many vote.
        temperature: > 0.
        classes: number of classes.

    Returns:
        ``[N]`` int64 classes; of a tie the lowest.
    """
    s = similarity[:, :k]
    # Weights relative to the nearest neighbour's: the vote is the same, and exp(1 / 0.001) does not overflow.
    weights = ((s - s[:, :1]) / temperature).exp()
    votes = s.new_zeros(len(s), classes).scatter_add_(1, labels[:, :k], weights)
    return votes.argmax(1)


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int = 200, temperature: float = 0.1, classes: int = 0
) -> Tensor:
    """Weighted k-nearest-neighbour classes of queries; see :func:`knn_neighbours` and :func:`knn_vote`.

    Args:
        bank: ``[M, D]`` features of labelled images.
        bank_labels: ``[M]`` int64.
        queries: ``[N, D]``.
        k: neighbours that vote.
        temperature: > 0.
        classes: number of classes; 0 takes it from ``bank_labels``.

    Returns:
        ``[N]`` int64 classes.
    """
    similarity, position = knn_neighbours(bank, queries, k)
    return knn_vote(similarity, bank_labels[position], k, temperature, classes or int(bank_labels.max()) + 1)
