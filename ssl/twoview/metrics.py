"""Metrics of embeddings and rankings, and a kNN classifier, as pure functions without gradient, in at least fp32.

Suffixes of names are shapes: N images or queries, D embedding size, M stored vectors or results.
"""

import math

import torch
from torch import Tensor

from twoview.losses import l2_normalize

UNIFORMITY_BLOCK = 2048  # rows and columns of a block of pairs
GRAM_ROWS = 8192  # above this number of rows, effective_rank uses the Gram matrix
KNN_COLUMNS = 65_536  # vectors of the bank that are compared at once
GROUP = 16  # columns of which only the maximum is sorted at first


@torch.no_grad()
def alignment(z_a: Tensor, z_b: Tensor) -> float:
    """Mean squared distance of positive pairs on the unit sphere, in [0, 4]; lower is better.

    Wang & Isola 2020, arXiv:2005.10242, with alpha = 2.

    Args:
        z_a: ``[N, D]`` embeddings of the first views, not necessarily normalized.
        z_b: ``[N, D]`` embeddings of the second views; row i is the positive of row i of ``z_a``.

    Example:
        >>> alignment(torch.eye(2), torch.eye(2).flip(0))
        2.0
    """
    return float((l2_normalize(z_a) - l2_normalize(z_b)).square().sum(1).mean())


@torch.no_grad()
def uniformity(z: Tensor) -> float:
    """Logarithm of the mean Gaussian potential of all pairs on the unit sphere, in [-8, 0]; lower is more uniform.

    Wang & Isola 2020, arXiv:2005.10242, with t = 2. Uniformly distributed embeddings tend to -4 for large D. Pairs are
    computed in blocks of 2,048 by 2,048, so that memory does not grow with N^2.

    Args:
        z: ``[N, D]`` embeddings, N >= 2, not necessarily normalized.

    Example:
        >>> uniformity(torch.eye(3))
        -4.0
    """
    u, parts = l2_normalize(z), []
    for i, rows in enumerate(u.split(UNIFORMITY_BLOCK)):
        for j, columns in enumerate(u.split(UNIFORMITY_BLOCK)[i:]):
            values = -2 * (2 - 2 * (rows @ columns.T)).clamp(min=0)
            once = values if j else values[torch.ones_like(values, dtype=torch.bool).triu(1)]  # each pair once
            parts.append(once.flatten().logsumexp(0))
    return float(torch.stack(parts).logsumexp(0) - math.log(len(u) * (len(u) - 1) // 2))


@torch.no_grad()
def effective_rank(z: Tensor, gram: Tensor | None = None) -> float:
    """RankMe: exponential of the entropy of the normalized singular values, in [1, min(N, D)].

    Garrido et al. 2023, arXiv:2210.02885, eq. 1, with its epsilon of 1e-7. The estimate needs at least 10 D rows. Only
    values of runs of the same method are comparable. Of more than 8,192 (and D) rows, the Gram matrix is decomposed.

    Args:
        z: ``[N, D]`` embeddings, not centered.
        gram: float64 ``[D, D]``, the Gram matrix ``z.T @ z`` if it is known already.

    Returns:
        The rank; 0 if all embeddings are zero.

    Example:
        >>> round(effective_rank(torch.eye(4)), 3)
        4.0
    """
    if gram is None and len(z) > max(GRAM_ROWS, z.shape[1]):
        device = "cpu" if z.device.type == "mps" else z.device  # no float64 on MPS
        gram = sum((x.T @ x for x in (part.to(device).double() for part in z.split(GRAM_ROWS))), torch.tensor(0.0))
    if gram is None:
        s = torch.linalg.svdvals(z if z.dtype == torch.float64 else z.float())
    else:
        s = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if float(s.sum()) == 0:
        return 0.0
    p = s / s.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


@torch.no_grad()
def feature_std(z: Tensor) -> float:
    """Standard deviation of each dimension of the normalized rows, averaged over dimensions and multiplied by sqrt(D).

    The value is 0 for collapsed embeddings and 1 for uniformly distributed embeddings. SimSiam, Chen & He 2021,
    arXiv:2011.10566, section 4.1.

    Args:
        z: ``[N, D]`` embeddings, N >= 2, not necessarily normalized.

    Example:
        >>> feature_std(torch.eye(4))
        1.0
    """
    return float(l2_normalize(z).std(0).mean() * math.sqrt(z.shape[1]))


@torch.no_grad()
def contrastive_logs(
    positive: Tensor, similarity: Tensor, valid: Tensor, above: float | None = None
) -> dict[str, Tensor]:
    """Compute the metrics of a contrastive task that are logged during training.

    Args:
        positive: ``[N]`` cosine similarity of each row to its positive.
        similarity: ``[N, M]`` cosine similarities.
        valid: boolean ``[N, M]``, true where a column is a negative of the row.
        above: similarity above which negatives are taken for false ones; None for no limit.

    Returns:
        Scalars. ``contrastive_top1``: share of rows whose positive is more similar than every negative, without
        ties. ``positive_similarity`` and ``negative_similarity``: mean cosine similarities to positives and negatives.
        ``masked``, with ``above``: share of the negatives that are more similar.

    Example:
        >>> valid = torch.ones(2, 2, dtype=torch.bool)
        >>> logs = contrastive_logs(torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0.0], [0.5, 0.0]]), valid)
        >>> logs["contrastive_top1"], logs["negative_similarity"]
        (tensor(0.5000), tensor(0.2500))
    """
    if not similarity.shape[1]:  # an empty queue
        similarity, valid = similarity.new_zeros(len(positive), 1), valid.new_zeros(len(positive), 1)
    logs = {
        "contrastive_top1": (positive > similarity.masked_fill(~valid, -math.inf).amax(1)).float().mean(),
        "positive_similarity": positive.mean(),
        "negative_similarity": (similarity * valid).sum() / valid.sum().clamp(min=1),
    }
    if above is not None:
        logs["masked"] = (valid & (similarity > above)).sum() / valid.sum().clamp(min=1)
    return logs


@torch.no_grad()
def in_batch_logs(
    z_a: Tensor, z_b: Tensor, same: Tensor | None = None, above: float | None = None, rows: int = 256
) -> dict[str, Tensor]:
    """Compute :func:`contrastive_logs` of the first views; all views of other images in the batch are negatives.

    Args:
        z_a: ``[N, D]`` embeddings of the first views.
        z_b: ``[N, D]`` embeddings of the second views; row i is the positive of row i of ``z_a``.
        same: int ``[N]``; images with equal numbers >= 0 are not negatives of each other. None for no such images.
        above: see :func:`contrastive_logs`.
        rows: number of first views that are evaluated; limits the cost for large batches.

    Example:
        >>> in_batch_logs(torch.eye(3), torch.eye(3))["contrastive_top1"]
        tensor(1.)
    """
    u_a, u_b, anchors = l2_normalize(z_a), l2_normalize(z_b), l2_normalize(z_a[:rows])
    own = torch.eye(len(anchors), len(u_a), dtype=torch.bool, device=u_a.device)
    own = own if same is None else own | ((same[:rows, None] == same) & (same >= 0))
    with torch.autocast(u_a.device.type, enabled=False):
        similarity = anchors @ torch.cat([u_a, u_b]).T
    return contrastive_logs((anchors * u_b[:rows]).sum(1), similarity, ~torch.cat([own, own], 1), above)


@torch.no_grad()
def recall_at_k(relevant: Tensor, k: int) -> float:
    """Recall@k: share of queries with at least one relevant result among their first k, in [0, 1].

    Song et al. 2016, arXiv:1511.06452, section 6. Also called hit rate.

    Args:
        relevant: boolean ``[N, M]``, true where a result is relevant to the query; best result first.
        k: number of first results that are considered, >= 1.

    Example:
        >>> recall_at_k(torch.tensor([[False, True], [False, False]]), k=2)
        0.5
    """
    return float(relevant[:, :k].any(1).double().mean())


@torch.no_grad()
def precision_at_k(relevant: Tensor, k: int) -> float:
    """Precision@k: share of relevant results among the first k, averaged over queries, in [0, 1].

    Manning, Raghavan & Schuetze 2008, Introduction to Information Retrieval, section 8.4.

    Args:
        relevant: boolean ``[N, M]``, true where a result is relevant to the query; best result first.
        k: number of first results that are considered, >= 1.

    Example:
        >>> precision_at_k(torch.tensor([[False, True], [False, False]]), k=2)
        0.25
    """
    return float(relevant[:, :k].double().sum(1).mean() / k)


@torch.no_grad()
def mean_reciprocal_rank(relevant: Tensor) -> float:
    """Mean reciprocal rank (MRR) of the first relevant result, in [0, 1].

    Voorhees 1999, TREC-8 Question Answering Track. A query without relevant results counts as 0.

    Args:
        relevant: boolean ``[N, M]``, true where a result is relevant to the query; best result first.

    Example:
        >>> mean_reciprocal_rank(torch.tensor([[False, True], [True, False]]))
        0.75
    """
    return float((relevant.any(1) / (relevant.int().argmax(1) + 1.0)).double().mean())


@torch.no_grad()
def mean_average_precision(relevant: Tensor) -> float:
    """Mean average precision (mAP), in [0, 1].

    The average precision of a query is the mean of the precision at the rank of each relevant result; it is 0 without
    relevant results. Manning, Raghavan & Schuetze 2008, Introduction to Information Retrieval, section 8.4.

    Args:
        relevant: boolean ``[N, M]``, true where a result is relevant to the query; best result first.

    Example:
        >>> mean_average_precision(torch.tensor([[False, True], [True, True]]))
        0.75
    """
    found = relevant.cumsum(1, dtype=torch.int32)
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    precision = (found / ranks).masked_fill_(~relevant, 0).sum(1, dtype=torch.float64)
    return float((precision / relevant.sum(1).clamp(min=1)).mean())


@torch.no_grad()
def knn_neighbors(
    bank: Tensor, queries: Tensor, k: int, chunk: int = 512, device: torch.device | None = None, unit: bool = False
) -> tuple[Tensor, Tensor]:
    """Find the k nearest neighbors of each query in the bank by cosine similarity.

    Memory does not grow with N * M. The result is that of all similarities in fp32; which of several equally similar
    vectors are returned, and in which order, is not defined.

    Args:
        bank: ``[M, D]`` features, not necessarily normalized.
        queries: ``[N, D]`` features, not necessarily normalized.
        k: number of neighbors; if the bank is smaller, M neighbors are returned.
        chunk: number of queries processed at once.
        device: device of the computation, to which blocks are copied; None for the device of the queries.
        unit: whether all features have unit length already.

    Returns:
        Cosine similarities and int64 positions in the bank, ``[N, k]`` each, most similar first, on their device.

    Example:
        >>> similarity, position = knn_neighbors(torch.eye(3), torch.tensor([[0.0, 4.0, 3.0]]), k=2)
        >>> similarity, position
        (tensor([[0.8000, 0.6000]]), tensor([[1, 2]]))
    """
    device, parts, scaled = device or queries.device, queries.split(chunk), Tensor.float if unit else l2_normalize
    best: list[tuple[Tensor, Tensor]] = []
    for start in range(0, max(1, len(bank)), KNN_COLUMNS):
        block = scaled(bank[start : start + KNN_COLUMNS].to(device)).T
        memory = block.new_empty(len(parts[0]) * block.shape[1])  # new memory for each product takes a fifth longer
        for place, part in enumerate(parts):
            similarity = memory[: len(part) * block.shape[1]].view(len(part), -1)
            torch.mm(scaled(part.to(device)), block, out=similarity)
            values, positions = _top(similarity, min(k, block.shape[1]))
            if not start:
                best.append((values, positions))
                continue
            known = best[place]
            values, order = torch.cat([known[0], values], 1).topk(min(k, start + block.shape[1]), dim=1)
            best[place] = values, torch.cat([known[1], positions + start], 1).gather(1, order)
    similarity, position = (torch.cat(column).to(queries.device) for column in zip(*best, strict=True))
    return similarity, position


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row of ``[n, m]`` in decreasing order, and their columns; k <= m."""
    m = similarity.shape[1]
    if m < 4096 or m < 4 * GROUP * k:
        return tuple(similarity.topk(k, dim=1))  # type: ignore[return-value]
    # To sort is slow. The k groups with the largest maxima hold k values that are at least as large as every value of
    # the other groups. Column j of group i is j * groups + i, so that maxima are taken over whole rows of memory.
    groups = m // GROUP
    maxima = similarity[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1)
    members = torch.arange(GROUP, device=similarity.device)[:, None] * groups
    columns = (maxima.topk(k, dim=1, sorted=False).indices[:, None] + members).flatten(1)
    rest = torch.arange(groups * GROUP, m, device=similarity.device)
    columns = torch.cat([columns, rest.expand(len(similarity), -1)], 1)
    values, order = similarity.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, order)


@torch.no_grad()
def knn_vote(similarity: Tensor, labels: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Classify by a weighted vote of the k nearest neighbors, with weights ``exp(cosine / temperature)``.

    Wu et al. 2018, arXiv:1805.01978, section 3.4.

    Args:
        similarity: ``[N, K]`` cosine similarities of the neighbors, most similar neighbor first.
        labels: int64 ``[N, K]`` classes of the neighbors.
        k: number of neighbors that vote; if K is smaller, all K vote.
        temperature: temperature of the weights, > 0.
        classes: number of classes.

    Returns:
        int64 ``[N]`` predicted classes; of classes with equal votes, the one with the lowest index.

    Example:
        >>> knn_vote(torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[2, 1, 1]]), k=3, temperature=1.0, classes=3)
        tensor([1])
    """
    found = []
    # In blocks of rows, since votes are [N, classes].
    for s, classes_of in zip(similarity[:, :k].split(4096), labels[:, :k].split(4096), strict=True):
        # Weights relative to the nearest neighbor give the same vote, and exp(1 / 0.001) does not overflow.
        weights = ((s - s[:, :1]) / temperature).exp()
        found.append(s.new_zeros(len(s), classes).scatter_add_(1, classes_of, weights).argmax(1))
    return torch.cat(found)


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int = 200, temperature: float = 0.1, classes: int = 0
) -> Tensor:
    """Classify by weighted k nearest neighbors: :func:`knn_neighbors` followed by :func:`knn_vote`.

    Wu et al. 2018, arXiv:1805.01978, section 3.4.

    Args:
        bank: ``[M, D]`` features of labeled images.
        bank_labels: int64 ``[M]`` classes of these images, >= 0.
        queries: ``[N, D]`` features of the images to classify.
        k: number of neighbors that vote.
        temperature: temperature of the weights, > 0.
        classes: number of classes; 0 for ``bank_labels.max() + 1``.

    Returns:
        int64 ``[N]`` predicted classes.

    Example:
        >>> knn_predict(torch.eye(2), torch.tensor([1, 0]), torch.tensor([[0.9, 0.1]]), k=1)
        tensor([1])
    """
    similarity, position = knn_neighbors(bank, queries, k)
    return knn_vote(similarity, bank_labels[position], k, temperature, classes or int(bank_labels.max()) + 1)
