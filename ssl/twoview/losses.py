"""Contrastive losses as pure functions of embeddings.

Suffixes of names are shapes: N images or queries, D embedding size, K stored negatives, M columns of a similarity
matrix. Embeddings are L2-normalized. Losses are means over rows, computed in at least fp32 without autocast; values and
gradients are finite for temperatures >= 1e-3, also if an embedding is zero.
"""

import math
from typing import Unpack, overload

import torch
from torch import Tensor

from twoview.variants import Variant, VariantParameters, check_loss_arguments


def l2_normalize(x: Tensor) -> Tensor:
    """Scale each row of ``x`` ``[N, D]`` to unit L2 norm, in at least fp32; a zero row stays zero.

    Example:
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    x = x if x.dtype == torch.float64 else x.float()
    norm, number = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True), torch.finfo(x.dtype)
    # Rows whose squares would under- or overflow are scaled first, all others divided by exactly 1.
    ordinary = (norm > math.sqrt(number.tiny / number.eps)) & (norm < math.inf)
    largest = x.detach().abs().amax(1, keepdim=True)
    x = x / torch.where(ordinary | (largest == 0), 1.0, largest)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # F.normalize divides a zero row by 1e-12. The resulting gradient of 1e12 overflows in half precision.
    return x / torch.where(norm > 0, norm, 1.0)


def nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    temperature: float,
    *,
    variant: Variant = "infonce",
    same: Tensor | None = None,
    **parameters: Unpack[VariantParameters],
) -> Tensor:
    """NT-Xent loss: the positive of each of the 2N views is the other view of the same image.

    All other views of the batch are negatives. SimCLR, Chen et al. 2020, arXiv:2002.05709, eq. 1 and Algorithm 1.

    Args:
        z_a: ``[N, D]`` embeddings of the first views, any floating dtype, not necessarily normalized.
        z_b: ``[N, D]`` embeddings of the second views; row i belongs to the same image as row i of ``z_a``.
        temperature: softmax temperature, > 0.
        variant: form of the loss, see :func:`info_nce_rows`.
        same: known positives, which are removed from the negatives. Either int ``[N]``, one id per image: images with
            equal ids >= 0 are positives of each other. Or a boolean ``[N, N]`` mask.
        **parameters: parameters ``sigma``, ``tau_plus`` and ``beta`` of the variants, see :func:`info_nce_rows`.

    Raises:
        ValueError: if shapes differ, a parameter is out of range, or the variant is unknown.
        TypeError: if a parameter is unknown.

    Example:
        >>> nt_xent(torch.eye(4), torch.eye(4), temperature=0.5)
        tensor(0.5944)
        >>> nt_xent(torch.eye(4), torch.eye(4), temperature=0.5, variant="hard", beta=0.5)
        tensor(0.2115)
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2:
        raise ValueError(f"nt_xent needs two [N, D] tensors of one shape, not {list(z_a.shape)} and {list(z_b.shape)}")
    n = len(z_a)
    with torch.autocast(z_a.device.type, enabled=False):  # bf16 logits lose digits at small temperatures
        z_2ND = torch.cat([l2_normalize(z_a), l2_normalize(z_b)])
        similarity_MM = z_2ND @ z_2ND.T
        partner = torch.arange(2 * n, device=z_a.device).roll(n)
        positive = similarity_MM.gather(1, partner[:, None]).squeeze(1)
        # Not negatives of a view: the view itself, the other view of the same image, and the views of known positives.
        valid_MM = ~positive_mask(same, n, z_a.device).repeat(2, 2)
        return info_nce_rows(positive, similarity_MM, valid_MM, temperature, variant, **parameters).mean()


def info_nce(
    q: Tensor,
    k: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    variant: Variant = "infonce",
    same: Tensor | None = None,
    **parameters: Unpack[VariantParameters],
) -> Tensor:
    """InfoNCE loss with stored negatives; MoCo, He et al. 2020, arXiv:1911.05722, eq. 1.

    Args:
        q: ``[N, D]`` queries, any floating dtype, not necessarily normalized.
        k: ``[N, D]`` keys; row i is the positive of query i.
        negatives: ``[K, D]`` stored keys of earlier batches, which are the negatives of every query; K may be 0.
        temperature: softmax temperature, > 0.
        variant: form of the loss, see :func:`info_nce_rows`.
        same: boolean ``[N, K]``, true where a stored key is a known positive of a query; removed from the negatives.
        **parameters: parameters ``sigma``, ``tau_plus`` and ``beta`` of the variants, see :func:`info_nce_rows`.

    Raises:
        ValueError: if shapes do not match, a parameter is out of range, or the variant is unknown.
        TypeError: if a parameter is unknown.

    Example:
        >>> info_nce(torch.eye(2), torch.eye(2), negatives=-torch.eye(2), temperature=0.5)
        tensor(0.1429)
    """
    if q.shape != k.shape or q.ndim != 2 or negatives.ndim != 2 or negatives.shape[1] != q.shape[1]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, negatives))
        raise ValueError(f"info_nce needs q [N, D], k [N, D] and negatives [K, D], not {shapes}")
    with torch.autocast(q.device.type, enabled=False):
        q_ND, k_ND, negatives_KD = l2_normalize(q), l2_normalize(k), l2_normalize(negatives)
        similarity_NK = q_ND @ negatives_KD.T
        valid_NK = torch.ones_like(similarity_NK, dtype=torch.bool) if same is None else ~same
        positive = (q_ND * k_ND).sum(1)
        return info_nce_rows(positive, similarity_NK, valid_NK, temperature, variant, **parameters).mean()


def moco_v3_loss(q_a: Tensor, k_b: Tensor, q_b: Tensor, k_a: Tensor, temperature: float) -> Tensor:
    """MoCo v3 loss ``2T (batch_nce(q_a, k_b) + batch_nce(q_b, k_a))``; Chen et al. 2021, arXiv:2104.02057, Algorithm 1.

    Args:
        q_a: ``[N, D]`` predictions of the first views.
        k_b: ``[N, D]`` keys of the second views; detached. Row i of each argument belongs to image i.
        q_b: ``[N, D]`` predictions of the second views.
        k_a: ``[N, D]`` keys of the first views; detached.
        temperature: softmax temperature T, > 0.

    Raises:
        ValueError: if shapes differ or the temperature is out of range.

    Example:
        >>> moco_v3_loss(torch.eye(3), torch.eye(3), torch.eye(3), torch.eye(3), temperature=1.0)
        tensor(2.2058)
    """
    a_to_b, b_to_a = batch_nce(q_a, k_b.detach(), temperature), batch_nce(q_b, k_a.detach(), temperature)
    return 2 * temperature * (a_to_b + b_to_a)


def clip_loss(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Mean of :func:`batch_nce` in both directions; CLIP, Radford et al. 2021, arXiv:2103.00020, figure 3.

    Args:
        z_a: ``[N, D]`` embeddings.
        z_b: ``[N, D]`` embeddings; row i is the positive of row i of ``z_a``.
        temperature: softmax temperature, > 0.

    Raises:
        ValueError: if shapes differ or the temperature is out of range.

    Example:
        >>> clip_loss(torch.eye(3), torch.eye(3), temperature=1.0)
        tensor(0.5514)
    """
    return (batch_nce(z_a, z_b, temperature) + batch_nce(z_b, z_a, temperature)) / 2


def batch_nce(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """InfoNCE loss with in-batch negatives; Oord et al. 2018, arXiv:1807.03748, eq. 4.

    Args:
        q: ``[N, D]`` queries, any floating dtype, not necessarily normalized.
        k: ``[N, D]`` keys; row i is the positive of query i, the other rows are its negatives.
        temperature: softmax temperature, > 0.

    Raises:
        ValueError: if shapes differ or the temperature is out of range.

    Example:
        >>> batch_nce(torch.eye(3), torch.eye(3), temperature=1.0)
        tensor(0.5514)
    """
    if q.shape != k.shape or q.ndim != 2:
        raise ValueError(f"batch_nce needs two [N, D] tensors of one shape, not {list(q.shape)} and {list(k.shape)}")
    with torch.autocast(q.device.type, enabled=False):
        similarity_NN = l2_normalize(q) @ l2_normalize(k).T
        valid_NN = ~positive_mask(None, len(q), q.device)
        return info_nce_rows(similarity_NN.diagonal(), similarity_NN, valid_NN, temperature).mean()


def sup_con(z_a: Tensor, z_b: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss L_out (Khosla et al. 2020, arXiv:2004.11362, eq. 2), averaged over the 2N views.

    All views of the same class are positives of each other. If all labels differ, the loss equals :func:`nt_xent`.

    Args:
        z_a: ``[N, D]`` embeddings of the first views.
        z_b: ``[N, D]`` embeddings of the second views; row i belongs to the same image as row i of ``z_a``.
        labels: int64 ``[N]`` classes; a view with a negative label has one positive, the other view of the same image.
        temperature: softmax temperature, > 0.

    Raises:
        ValueError: if shapes do not match or the temperature is out of range.

    Example:
        >>> sup_con(torch.eye(4), torch.eye(4), labels=torch.tensor([0, 0, 1, -1]), temperature=0.5)
        tensor(1.2611)
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2 or labels.shape != z_a.shape[:1]:
        shapes = ", ".join(str(list(x.shape)) for x in (z_a, z_b, labels))
        raise ValueError(f"sup_con needs two [N, D] tensors and labels [N], not {shapes}")
    check_loss_arguments(temperature)
    with torch.autocast(z_a.device.type, enabled=False):
        z_2ND = torch.cat([l2_normalize(z_a), l2_normalize(z_b)])
        self_MM = torch.eye(len(z_2ND), dtype=torch.bool, device=z_a.device)
        positives_MM = positive_mask(labels, len(labels), z_a.device).repeat(2, 2) & ~self_MM
        logits_MM = (z_2ND @ z_2ND.T / temperature).masked_fill(self_MM, -math.inf)
        log_p_MM = logits_MM - logits_MM.logsumexp(1, keepdim=True)
        return -(log_p_MM.masked_fill(~positives_MM, 0).sum(1) / positives_MM.sum(1)).mean()


def info_nce_rows(
    positive: Tensor,
    similarity: Tensor,
    valid: Tensor,
    temperature: float,
    variant: Variant = "infonce",
    sigma: float | None = None,
    tau_plus: float | None = None,
    beta: float | None = None,
) -> Tensor:
    """Contrastive loss of each row, computed from similarities to its positive and to its negatives.

    s+ is the logit of the positive and s- are the logits of the n negatives; a logit is a similarity / temperature.

    * "infonce": ``-s+ + log(exp s+ + sum exp s-)``.
    * "dcl": ``-s+ + log(sum exp s-)``; decoupled contrastive loss, Yeh et al. 2022, arXiv:2110.06848, eq. 6.
    * "dclw": ``-w s+ + log(sum exp s-)`` with the detached weight ``w = 2 - exp(p / sigma) / mean exp(p / sigma)``.
      p is the similarity to the positive, and the mean is taken over rows; Yeh et al., eq. 7.
    * "debiased": ``-s+ + log(exp s+ + n max(g, exp(-1 / temperature)))`` with
      ``g = (mean exp s- - tau_plus exp s+) / (1 - tau_plus)``; Chuang et al. 2020, arXiv:2007.00224, eq. 8.
    * "hard": "debiased" with ``exp s-`` averaged with weights ``exp(beta s-)``; Robinson 2021, arXiv:2010.04592, eq. 4.

    Args:
        positive: ``[N]`` cosine similarity of each row to its positive.
        similarity: ``[N, M]`` cosine similarities.
        valid: boolean ``[N, M]``, true where a column is a negative of the row.
        temperature: softmax temperature, > 0.
        variant: name of the formula, one of the above.
        sigma: width of the weights of "dclw", > 0; None for 0.5.
        tau_plus: assumed share of false negatives for "debiased" and "hard", in [0, 1); None for 0.1.
        beta: concentration on hard negatives for "hard", >= 0; None for 1.

    Returns:
        ``[N]`` losses in the dtype of ``similarity``; a row without negatives has loss 0 and no gradient.

    Raises:
        ValueError: if a parameter is out of range or belongs to another variant, or the variant is unknown.

    Example:
        >>> similarity = torch.tensor([[0.5, -0.5, 1.0], [0.5, -0.5, 1.0]])
        >>> valid = torch.tensor([[True, True, False], [False, False, False]])
        >>> info_nce_rows(torch.tensor([1.0, 1.0]), similarity, valid, temperature=0.5)
        tensor([0.3490, 0.0000])
    """
    parameters = check_loss_arguments(temperature, variant, sigma, tau_plus, beta)
    if similarity.shape[1] == 0:
        return positive * 0
    count = valid.sum(1)
    any_negative = count > 0
    # Rows without negatives keep all columns: logsumexp of nothing has a NaN gradient. Their loss is set to 0 below.
    excluded = ~valid & any_negative[:, None]

    def log_sum(scale: float) -> Tensor:
        # logsumexp subtracts the maximum of each row. A constant would let small temperatures underflow.
        return (similarity * (scale / temperature)).masked_fill(excluded, -math.inf).logsumexp(1)

    s_positive = positive / temperature
    match variant:
        case "infonce":
            loss = torch.logaddexp(s_positive, log_sum(1)) - s_positive
        case "dcl":
            loss = log_sum(1) - s_positive
        case "dclw":
            weight = 2 - torch.softmax(positive / parameters["sigma"], 0) * len(positive)
            loss = log_sum(1) - weight.detach() * s_positive
        case "debiased" | "hard":
            log_count = count.clamp(min=1).to(similarity.dtype).log()
            weight_of = parameters.get("beta")
            log_mean = log_sum(1) - log_count if weight_of is None else log_sum(1 + weight_of) - log_sum(weight_of)
            log_g = _log_debiased(log_mean, s_positive, parameters["tau_plus"], floor=-1 / temperature)
            loss = torch.logaddexp(s_positive, log_g + log_count) - s_positive
    return torch.where(any_negative, loss, 0.0)


@overload
def chance_level(valid_negatives: int, variant: Variant = "infonce") -> float: ...
@overload
def chance_level(valid_negatives: Tensor, variant: Variant = "infonce") -> Tensor: ...
def chance_level(valid_negatives: Tensor | int, variant: Variant = "infonce") -> Tensor | float:
    """Loss if all similarities are equal: the mean of ``log(1 + n)``, or of ``log(n)`` for "dcl" and "dclw".

    Args:
        valid_negatives: number n of negatives, either equal for all rows or ``[N]``, one number per row.
        variant: form of the loss, see :func:`info_nce_rows`.

    Returns:
        A number if n is a Python integer. Otherwise a scalar tensor on the device of ``valid_negatives``, so that the
        caller decides when to wait for its value; float64, or fp32 on MPS, which has no float64.

    Example:
        >>> round(chance_level(511), 4), chance_level(torch.tensor([511, 511]))
        (6.2383, tensor(6.2383, dtype=torch.float64))
    """
    counts = torch.as_tensor(valid_negatives)
    counts = counts.to(torch.float32 if counts.device.type == "mps" else torch.float64)
    level = torch.log(counts.clamp(min=1) if variant in ("dcl", "dclw") else 1 + counts).mean()
    return float(level) if isinstance(valid_negatives, int) else level


def _log_debiased(log_mean: Tensor, s_positive: Tensor, tau_plus: float, floor: float) -> Tensor:
    """``log max((exp(log_mean) - tau_plus exp(s_positive)) / (1 - tau_plus), exp(floor))``, computed in log space."""
    if tau_plus == 0:
        return log_mean.clamp(min=floor)
    gap = (s_positive + math.log(tau_plus) - log_mean).clamp(max=0)
    above_zero = gap < 0
    # In rows that are set to the floor, -1 replaces gap: log1p(-exp(0)) = -inf would have a NaN gradient.
    shrink = torch.log1p(-torch.where(above_zero, gap, -1.0).exp())
    return torch.where(above_zero, log_mean + shrink - math.log1p(-tau_plus), floor).clamp(min=floor)


def positive_mask(same: Tensor | None, n: int, device: torch.device) -> Tensor:
    """Boolean ``[N, N]`` mask, true on the diagonal and for known positives; ``same`` as in :func:`nt_xent`.

    >>> positive_mask(torch.tensor([3, 3, -1]), 3, torch.device("cpu")).sum(1)
    tensor([2, 2, 1])
    """
    diagonal = torch.eye(n, dtype=torch.bool, device=device)
    if same is None:
        return diagonal
    return diagonal | ((same[:, None] == same) & (same >= 0) if same.ndim == 1 else same)
