"""Contrastive losses as pure functions of embeddings.

Shapes in names: N images (or queries), D embedding size, M columns of a similarity matrix.
Every loss computes in at least fp32 with autocast off: fp16 and bf16 embeddings are upcast, float64 stays float64.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Variant = Literal["infonce", "dcl", "dclw", "debiased", "hard"]
VARIANTS: tuple[str, ...] = get_args(Variant)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of ``x`` ``[N, D]`` scaled to length 1, in at least fp32; a zero row stays zero, with a finite gradient."""
    x = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # F.normalize divides a zero row by 1e-12, whose gradient of 1e12 overflows in the half precision of the network.
    return x / torch.where(norm > 0, norm, 1.0)


def nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    temperature: float,
    *,
    variant: Variant = "infonce",
    sigma: float = 0.5,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    same: Tensor | None = None,
) -> Tensor:
    """NT-Xent: each of 2N views must pick its partner among the other 2N - 1 views of the batch.

    SimCLR, Chen et al. 2020, arXiv:2002.05709, eq. 1 and Algorithm 1: cosine similarities, mean over all 2N rows.

    Args:
        z_a: ``[N, D]`` embeddings of the first views, of any floating type and length.
        z_b: ``[N, D]`` embeddings of the second views, row i of the same image as row i of ``z_a``.
        temperature: softmax temperature, > 0; finite in value and gradient from 1e-3 on.
        variant: what is done with positives and negatives, see :func:`contrast`.
        sigma: of "dclw".
        tau_plus: of "debiased" and "hard".
        beta: of "hard".
        same: ``[N]`` integer ids, or ``[N, N]`` boolean mask: images known to be alike are no negatives of each other.

    Returns:
        Scalar of at least fp32.

    Raises:
        ValueError: shapes that differ, a temperature that is not positive, an unknown variant.
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2:
        raise ValueError(f"nt_xent needs two [N, D] tensors of one shape, not {list(z_a.shape)} and {list(z_b.shape)}")
    n = len(z_a)
    with torch.autocast(z_a.device.type, enabled=False):  # bf16 logits lose digits at small temperatures
        z_2ND = torch.cat([unit_rows(z_a), unit_rows(z_b)])
        similarity_MM = z_2ND @ z_2ND.T
        partner = torch.arange(2 * n, device=z_a.device).roll(n)
        positive = similarity_MM.gather(1, partner[:, None]).squeeze(1)
        # Row i is no negative of itself, nor is its partner, nor any view of a like image.
        valid_NN = ~(torch.eye(n, dtype=torch.bool, device=z_a.device) | _same_mask(same, n, z_a.device))
        return contrast(
            positive, similarity_MM, valid_NN.repeat(2, 2), temperature, variant, sigma, tau_plus, beta
        ).mean()


def info_nce(
    q: Tensor,
    k: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    variant: Variant = "infonce",
    sigma: float = 0.5,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    same: Tensor | None = None,
) -> Tensor:
    """InfoNCE against stored negatives: query i must pick key i over every stored key.

    MoCo, He et al. 2020, arXiv:1911.05722, eq. 1: cosine similarities, mean over the N queries.

    Args:
        q: ``[N, D]`` queries, with gradient.
        k: ``[N, D]`` keys of the same images.
        negatives: ``[K, D]`` keys of earlier batches, never this batch's own; K may be 0.
        temperature: softmax temperature, > 0; finite in value and gradient from 1e-3 on.
        variant: what is done with positives and negatives, see :func:`contrast`.
        sigma: of "dclw".
        tau_plus: of "debiased" and "hard".
        beta: of "hard".
        same: ``[N, K]`` boolean mask: stored keys that are alike to a query's image and so no negatives of it.

    Returns:
        Scalar of at least fp32.

    Raises:
        ValueError: shapes that differ, a temperature that is not positive, an unknown variant.
    """
    if q.shape != k.shape or q.ndim != 2 or negatives.ndim != 2 or negatives.shape[1] != q.shape[1]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, negatives))
        raise ValueError(f"info_nce needs q [N, D], k [N, D] and negatives [K, D], not {shapes}")
    with torch.autocast(q.device.type, enabled=False):
        q_ND, k_ND, negatives_KD = unit_rows(q), unit_rows(k), unit_rows(negatives)
        similarity_NK = q_ND @ negatives_KD.T
        valid_NK = torch.ones_like(similarity_NK, dtype=torch.bool) if same is None else ~same
        positive = (q_ND * k_ND).sum(1)
        return contrast(positive, similarity_NK, valid_NK, temperature, variant, sigma, tau_plus, beta).mean()


def moco_v3_loss(q_a: Tensor, k_b: Tensor, q_b: Tensor, k_a: Tensor, temperature: float) -> Tensor:
    """``2T [ctr(q_a, k_b) + ctr(q_b, k_a)]``: each prediction must pick its key among the keys of the batch.

    MoCo v3, Chen et al. 2021, arXiv:2104.02057, Algorithm 1. Keys take no gradient.

    Args:
        q_a: ``[N, D]`` predictions from the first views.
        k_b: ``[N, D]`` keys of the second views, row i of the same image.
        q_b: ``[N, D]`` predictions from the second views.
        k_a: ``[N, D]`` keys of the first views.
        temperature: > 0.

    Returns:
        Scalar of at least fp32.
    """
    there, back = batch_nce(q_a, k_b.detach(), temperature), batch_nce(q_b, k_a.detach(), temperature)
    return 2 * temperature * (there + back)


def clip_loss(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE: rows and columns of one matrix of similarities, both with gradient.

    CLIP, Radford et al. 2021, arXiv:2103.00020, figure 3.

    Args:
        z_a: ``[N, D]``.
        z_b: ``[N, D]``, row i the partner of row i of ``z_a``.
        temperature: > 0.

    Returns:
        Scalar of at least fp32.
    """
    return (batch_nce(z_a, z_b, temperature) + batch_nce(z_b, z_a, temperature)) / 2


def batch_nce(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """InfoNCE with the other rows of ``k`` as negatives: query i must pick key i among the N keys of the batch.

    Oord et al. 2018, arXiv:1807.03748, eq. 4; mean over the N queries.

    Args:
        q: ``[N, D]``.
        k: ``[N, D]``, row i the positive of query i.
        temperature: > 0.

    Returns:
        Scalar of at least fp32.

    Raises:
        ValueError: shapes that differ, a temperature that is not positive.
    """
    if q.shape != k.shape or q.ndim != 2:
        raise ValueError(f"batch_nce needs two [N, D] tensors of one shape, not {list(q.shape)} and {list(k.shape)}")
    with torch.autocast(q.device.type, enabled=False):
        similarity_NN = unit_rows(q) @ unit_rows(k).T
        others_NN = ~torch.eye(len(q), dtype=torch.bool, device=q.device)
        return contrast(similarity_NN.diagonal(), similarity_NN, others_NN, temperature).mean()


def sup_con(z_a: Tensor, z_b: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss L_out: each view must pick all other views of its class over the rest of the batch.

    Khosla et al. 2020, arXiv:2004.11362, eq. 2: the mean over positives stands outside the logarithm, and the mean is
    taken over all 2N rows. With labels all different it is :func:`nt_xent`.

    Args:
        z_a: ``[N, D]`` embeddings of the first views.
        z_b: ``[N, D]`` embeddings of the second views, row i of the same image.
        labels: int64 ``[N]``; an image with a negative label has its own other view as its only positive.
        temperature: > 0.

    Returns:
        Scalar of at least fp32.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive.
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2 or labels.shape != z_a.shape[:1]:
        shapes = ", ".join(str(list(x.shape)) for x in (z_a, z_b, labels))
        raise ValueError(f"sup_con needs two [N, D] tensors and labels [N], not {shapes}")
    if not (0 < temperature < math.inf):
        raise ValueError(f"temperature={temperature} must be a positive number")
    with torch.autocast(z_a.device.type, enabled=False):
        z_2ND = torch.cat([unit_rows(z_a), unit_rows(z_b)])
        self_MM = torch.eye(len(z_2ND), dtype=torch.bool, device=z_a.device)
        alike_NN = ((labels[:, None] == labels) & (labels >= 0)) | self_MM[: len(labels), : len(labels)]
        positives_MM = alike_NN.repeat(2, 2) & ~self_MM
        logits_MM = (z_2ND @ z_2ND.T / temperature).masked_fill(self_MM, -math.inf)
        log_p_MM = logits_MM - logits_MM.logsumexp(1, keepdim=True)
        return -(log_p_MM.masked_fill(~positives_MM, 0).sum(1) / positives_MM.sum(1)).mean()


def contrast(
    positive: Tensor,
    similarity: Tensor,
    valid: Tensor,
    temperature: float,
    variant: Variant = "infonce",
    sigma: float = 0.5,
    tau_plus: float = 0.1,
    beta: float = 1.0,
) -> Tensor:
    """Loss of each row from its positive and its negatives; the arithmetic that all losses here share.

    With s+ the positive's logit and s- the M negatives' logits (similarity / temperature):

    * "infonce": ``-s+ + log(exp s+ + sum exp s-)``.
    * "dcl": ``-s+ + log(sum exp s-)``; decoupled, Yeh et al. 2022, arXiv:2110.06848, eq. 6.
    * "dclw": as "dcl" with ``s+`` weighted by ``2 - exp(p / sigma) / mean exp(p / sigma)``, p the positive's cosine
      and the weight held constant in the gradient; eq. 7.
    * "debiased": the mean of the negatives freed from a share ``tau_plus`` of hidden positives, floored at
      ``exp(-1 / temperature)``; Chuang et al. 2020, arXiv:2007.00224, eq. 8.
    * "hard": "debiased" with negatives weighted by ``exp(beta s-)``; Robinson et al. 2021, arXiv:2010.04592, eq. 4.

    A row without negatives has loss 0 and no gradient.

    Args:
        positive: ``[N]`` cosine similarity of each row with its positive.
        similarity: ``[N, M]`` cosine similarities.
        valid: ``[N, M]`` boolean: which columns are negatives of the row.
        temperature: > 0.
        variant: one of the above.
        sigma: > 0.
        tau_plus: in [0, 1).
        beta: >= 0.

    Returns:
        ``[N]`` losses in the type of ``similarity``.

    Raises:
        ValueError: a temperature that is not positive and finite, an unknown variant.
    """
    if not (0 < temperature < math.inf):
        raise ValueError(f"temperature={temperature} must be a positive number")
    if similarity.shape[1] == 0:
        return positive * 0
    count = valid.sum(1)
    any_negative = count > 0
    # Rows without negatives keep all columns, so that no logsumexp runs over nothing (its gradient is NaN);
    # their loss is set to 0 at the end.
    excluded = ~valid & any_negative[:, None]

    def log_sum(scale: float) -> Tensor:
        # logsumexp subtracts each row's own maximum; a constant shift would underflow at small temperatures.
        return (similarity * (scale / temperature)).masked_fill(excluded, -math.inf).logsumexp(1)

    s_positive = positive / temperature
    match variant:
        case "infonce":
            loss = torch.logaddexp(s_positive, log_sum(1)) - s_positive
        case "dcl":
            loss = log_sum(1) - s_positive
        case "dclw":
            weight = 2 - torch.softmax(positive / sigma, 0) * len(positive)
            loss = log_sum(1) - weight.detach() * s_positive
        case "debiased" | "hard":
            log_count = count.clamp(min=1).to(similarity.dtype).log()
            log_mean = log_sum(1) - log_count if variant == "debiased" else log_sum(1 + beta) - log_sum(beta)
            log_g = _log_debiased(log_mean, s_positive, tau_plus, floor=-1 / temperature)
            loss = torch.logaddexp(s_positive, log_g + log_count) - s_positive
        case _:
            raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")
    return torch.where(any_negative, loss, 0.0)


def chance_level(valid_negatives: Tensor | int, variant: Variant = "infonce") -> float:
    """Loss of embeddings that say nothing: ``log(1 + negatives)``, averaged over rows; ``log(negatives)`` for DCL.

    Args:
        valid_negatives: number of negatives, one or ``[N]``, one for each row.
        variant: as in :func:`contrast`.

    >>> round(chance_level(511), 4)
    6.2383
    """
    counts = torch.as_tensor(valid_negatives).cpu().double()  # some devices have no float64
    decoupled = variant in ("dcl", "dclw")
    return float(torch.log(counts.clamp(min=1) if decoupled else 1 + counts).mean())


def _log_debiased(log_mean: Tensor, s_positive: Tensor, tau_plus: float, floor: float) -> Tensor:
    """``log max((exp(log_mean) - tau_plus exp(s_positive)) / (1 - tau_plus), exp(floor))`` without leaving the log."""
    if tau_plus == 0:
        return log_mean.clamp(min=floor)
    gap = (s_positive + math.log(tau_plus) - log_mean).clamp(max=0)
    positive_left = gap < 0
    # The inner where keeps log1p(-1) = -inf, and its gradient, out of rows that the floor decides.
    shrink = torch.log1p(-torch.where(positive_left, gap, -1.0).exp())
    return torch.where(positive_left, log_mean + shrink - math.log1p(-tau_plus), floor).clamp(min=floor)


def _same_mask(same: Tensor | None, n: int, device: torch.device) -> Tensor:
    """``[N, N]`` boolean mask from ids, a mask, or nothing."""
    if same is None:
        return torch.zeros(n, n, dtype=torch.bool, device=device)
    return same[:, None] == same[None, :] if same.ndim == 1 else same
