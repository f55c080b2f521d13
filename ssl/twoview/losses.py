"""Contrastive losses as pure functions of embeddings.

Suffixes: N images or queries, D embedding size, K stored negatives, M columns of a similarity matrix. Losses are means
over rows in at least fp32, autocast off; values and gradients are finite from temperature 1e-3 on, also for zero rows.
"""

import math
from typing import Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor

Variant = Literal["infonce", "dcl", "dclw", "debiased", "hard"]
VARIANTS: tuple[str, ...] = get_args(Variant)


class VariantParameters(TypedDict, total=False):
    """Parameters of the loss variants; :func:`info_nce_rows` has the formulas and the default values."""

    sigma: float
    tau_plus: float
    beta: float


def l2_normalize(x: Tensor) -> Tensor:
    """Scale each row of ``x`` ``[N, D]`` to unit L2 norm, in at least fp32; a zero row stays zero.

    Example:
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    x = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # F.normalize divides a zero row by 1e-12; the gradient of 1e12 overflows in the half precision of the network.
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
    """NT-Xent loss: each of the 2N views is classified against the other 2N - 1 views of the batch.

    SimCLR, Chen et al. 2020, arXiv:2002.05709, eq. 1 and Algorithm 1: cosine similarities, mean over all 2N rows.

    Args:
        z_a: ``[N, D]`` embeddings of the first views, any floating dtype, not necessarily normalized.
        z_b: ``[N, D]`` embeddings of the second views; row i belongs to the same image as row i of ``z_a``.
        temperature: softmax temperature, > 0.
        variant: form of the loss, see :func:`info_nce_rows`.
        same: known positives, which are removed from the negatives: ``[N]`` integer ids (images with equal ids are
            positives; a negative id means unknown and equals no other), or a boolean ``[N, N]`` mask.
        **parameters: ``sigma``, ``tau_plus`` and ``beta`` of the variant, see :func:`info_nce_rows`.

    Raises:
        ValueError: shapes that differ, a parameter out of range, or an unknown variant.
        TypeError: an unknown parameter.

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
        # Neither view i itself, nor its partner, nor a view of a known positive is a negative.
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
    """InfoNCE loss with stored negatives: query i is classified as key i against all stored keys.

    MoCo, He et al. 2020, arXiv:1911.05722, eq. 1: cosine similarities, mean over the N queries.

    Args:
        q: ``[N, D]`` queries, with gradient.
        k: ``[N, D]`` keys; row i belongs to the same image as row i of ``q``.
        negatives: ``[K, D]`` keys of earlier batches, without those of this batch; K may be 0.
        temperature: softmax temperature, > 0.
        variant: form of the loss, see :func:`info_nce_rows`.
        same: boolean ``[N, K]`` mask of stored keys that are known positives of a query and hence not its negatives.
        **parameters: ``sigma``, ``tau_plus`` and ``beta`` of the variant, see :func:`info_nce_rows`.

    Raises:
        ValueError: shapes that do not match, a parameter out of range, or an unknown variant.
        TypeError: an unknown parameter.

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
    """MoCo v3 loss ``2T [ctr(q_a, k_b) + ctr(q_b, k_a)]``, with ctr = :func:`batch_nce` and detached keys.

    MoCo v3, Chen et al. 2021, arXiv:2104.02057, Algorithm 1.

    Args:
        q_a: ``[N, D]`` predictions of the first views.
        k_b: ``[N, D]`` keys of the second views; row i belongs to the same image as row i of ``q_a``.
        q_b: ``[N, D]`` predictions of the second views.
        k_a: ``[N, D]`` keys of the first views.
        temperature: softmax temperature T, > 0.

    Example:
        >>> moco_v3_loss(torch.eye(3), torch.eye(3), torch.eye(3), torch.eye(3), temperature=1.0)
        tensor(2.2058)
    """
    a_to_b, b_to_a = batch_nce(q_a, k_b.detach(), temperature), batch_nce(q_b, k_a.detach(), temperature)
    return 2 * temperature * (a_to_b + b_to_a)


def clip_loss(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE loss: mean of :func:`batch_nce` in both directions, with gradient for both arguments.

    CLIP, Radford et al. 2021, arXiv:2103.00020, figure 3.

    Args:
        z_a: ``[N, D]``.
        z_b: ``[N, D]``; row i is the positive of row i of ``z_a``.
        temperature: softmax temperature, > 0.

    Example:
        >>> clip_loss(torch.eye(3), torch.eye(3), temperature=1.0)
        tensor(0.5514)
    """
    return (batch_nce(z_a, z_b, temperature) + batch_nce(z_b, z_a, temperature)) / 2


def batch_nce(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """InfoNCE loss with in-batch negatives: query i is classified as key i among the N keys.

    Oord et al. 2018, arXiv:1807.03748, eq. 4; mean over the N queries.

    Args:
        q: ``[N, D]`` queries.
        k: ``[N, D]`` keys; row i is the positive of query i.
        temperature: softmax temperature, > 0.

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
    """Supervised contrastive loss L_out: all views of the same class are positives of each other.

    Khosla et al. 2020, arXiv:2004.11362, eq. 2: the sum over positives is outside of the logarithm; here the mean over
    all 2N rows is returned. If all labels differ, the loss equals :func:`nt_xent`.

    Args:
        z_a: ``[N, D]`` embeddings of the first views.
        z_b: ``[N, D]`` embeddings of the second views; row i belongs to the same image as row i of ``z_a``.
        labels: int64 ``[N]``; the only positive of an image with a negative label is its own other view.
        temperature: softmax temperature, > 0.

    Raises:
        ValueError: shapes that do not match, or a temperature out of range.

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
    sigma: float = 0.5,
    tau_plus: float = 0.1,
    beta: float = 1.0,
) -> Tensor:
    """Contrastive loss of each row, from the similarity of its positive and those of its negatives.

    With s+ the logit of the positive and s- the logits of the negatives (logit = similarity / temperature):

    * "infonce": ``-s+ + log(exp s+ + sum exp s-)``.
    * "dcl": ``-s+ + log(sum exp s-)``; decoupled, Yeh et al. 2022, arXiv:2110.06848, eq. 6.
    * "dclw": "dcl" with ``s+`` multiplied by ``2 - exp(p / sigma) / mean exp(p / sigma)``, where p is the similarity of
      the positive; the factor is detached; eq. 7.
    * "debiased": the mean of ``exp s-`` is corrected for a share ``tau_plus`` of false negatives and clamped to at
      least ``exp(-1 / temperature)``; Chuang et al. 2020, arXiv:2007.00224, eq. 8.
    * "hard": "debiased" with negatives weighted by ``exp(beta s-)``; Robinson et al. 2021, arXiv:2010.04592, eq. 4.

    Args:
        positive: ``[N]`` cosine similarity of each row to its positive.
        similarity: ``[N, M]`` cosine similarities.
        valid: boolean ``[N, M]``: which columns are negatives of the row.
        temperature: softmax temperature, > 0.
        variant: one of the above.
        sigma: parameter of "dclw", > 0.
        tau_plus: parameter of "debiased" and "hard", in [0, 1).
        beta: parameter of "hard", >= 0.

    Returns:
        ``[N]`` losses in the dtype of ``similarity``; a row without negatives has loss 0 and no gradient.

    Raises:
        ValueError: a parameter out of range, or an unknown variant.

    Example:
        >>> similarity = torch.tensor([[0.5, -0.5, 1.0], [0.5, -0.5, 1.0]])
        >>> valid = torch.tensor([[True, True, False], [False, False, False]])
        >>> info_nce_rows(torch.tensor([1.0, 1.0]), similarity, valid, temperature=0.5)
        tensor([0.3490, 0.0000])
    """
    check_loss_arguments(temperature, variant, sigma, tau_plus, beta)
    if similarity.shape[1] == 0:
        return positive * 0
    count = valid.sum(1)
    any_negative = count > 0
    # Rows without negatives keep all columns, as logsumexp over none has a NaN gradient; their loss is set to 0 below.
    excluded = ~valid & any_negative[:, None]

    def log_sum(scale: float) -> Tensor:
        # logsumexp subtracts the maximum of each row; subtracting a constant would underflow at small temperatures.
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
    return torch.where(any_negative, loss, 0.0)


def chance_level(valid_negatives: Tensor | int, variant: Variant = "infonce") -> float:
    """Chance level: the loss of uninformative embeddings, for which all similarities are equal.

    It is ``log(1 + negatives)``, averaged over rows; ``log(negatives)`` for "dcl" and "dclw".

    Args:
        valid_negatives: number of negatives of every row, or ``[N]`` numbers, one per row.
        variant: see :func:`info_nce_rows`.

    Example:
        >>> round(chance_level(511), 4)
        6.2383
    """
    counts = torch.as_tensor(valid_negatives).cpu().double()  # some devices have no float64
    decoupled = variant in ("dcl", "dclw")
    return float(torch.log(counts.clamp(min=1) if decoupled else 1 + counts).mean())


def check_loss_arguments(
    temperature: float, variant: str = "infonce", sigma: float = 0.5, tau_plus: float = 0.1, beta: float = 1.0
) -> None:
    """Check the arguments that the losses share; see :func:`info_nce_rows`.

    Raises:
        ValueError: "NAME=VALUE: ADVICE" of the first argument that is out of range.

    Example:
        >>> check_loss_arguments(temperature=0.2, variant="debiased", tau_plus=0.05)
    """
    for name, value, in_range, advice in (
        ("temperature", temperature, 0 < temperature < math.inf, "must be above 0, such as 0.1 or 0.5"),
        ("variant", variant, variant in VARIANTS, f"choose one of {', '.join(VARIANTS)}"),
        ("sigma", sigma, 0 < sigma < math.inf, "must be above 0, such as 0.5"),
        ("tau_plus", tau_plus, 0 <= tau_plus < 1, "must be at least 0 and below 1, such as 0.1"),
        ("beta", beta, 0 <= beta < math.inf, "must be at least 0, such as 1.0"),
    ):
        if not in_range:
            raise ValueError(f"{name}={value}: {advice}")


def _log_debiased(log_mean: Tensor, s_positive: Tensor, tau_plus: float, floor: float) -> Tensor:
    """``log max((exp(log_mean) - tau_plus exp(s_positive)) / (1 - tau_plus), exp(floor))``, computed in log space."""
    if tau_plus == 0:
        return log_mean.clamp(min=floor)
    gap = (s_positive + math.log(tau_plus) - log_mean).clamp(max=0)
    above_zero = gap < 0
    # The inner where keeps log1p(-1) = -inf and its gradient out of the rows that are set to the floor.
    shrink = torch.log1p(-torch.where(above_zero, gap, -1.0).exp())
    return torch.where(above_zero, log_mean + shrink - math.log1p(-tau_plus), floor).clamp(min=floor)


def positive_mask(same: Tensor | None, n: int, device: torch.device) -> Tensor:
    """Boolean ``[N, N]`` mask of the diagonal and the known positives, given as ids, as a mask, or not at all.

    >>> positive_mask(torch.tensor([3, 3, -1]), 3, torch.device("cpu")).sum(1)
    tensor([2, 2, 1])
    """
    diagonal = torch.eye(n, dtype=torch.bool, device=device)
    if same is None:
        return diagonal
    return diagonal | ((same[:, None] == same) & (same >= 0) if same.ndim == 1 else same)
