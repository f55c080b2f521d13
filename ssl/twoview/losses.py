"""Contrastive losses as pure functions of embeddings.

Suffixes of names are shapes: N images or queries, D embedding size, K stored negatives. Embeddings are L2-normalized.
Losses are means over rows, computed in at least fp32 without autocast; values and gradients are finite for temperatures
>= 1e-3, also if an embedding is zero. All losses use :func:`twoview.streaming.mean_loss`: their memory is linear in the
numbers of images and negatives, and they have no second derivative.

Variants of the loss of a row: s+ is the logit of its positive and s- are the logits of its n negatives. A logit is a
cosine similarity / temperature.

* "infonce": ``-s+ + log(exp s+ + sum exp s-)``.
* "dcl": ``-s+ + log(sum exp s-)``; decoupled contrastive loss, Yeh et al. 2022, arXiv:2110.06848, eq. 6.
* "dclw": ``-w s+ + log(sum exp s-)`` with the weight ``w = 2 - exp(p / sigma) / mean exp(p / sigma)``. p is the
  similarity to the positive, and the mean is taken over the batch; Yeh et al., eq. 7.
* "debiased": ``-s+ + log(exp s+ + n max(g, exp(-1 / temperature)))`` with
  ``g = (mean exp s- - tau_plus exp s+) / (1 - tau_plus)``; Chuang et al. 2020, arXiv:2007.00224, eq. 8.
* "hard": "debiased" with ``exp s-`` averaged with weights ``exp(beta s-)``; Robinson 2021, arXiv:2010.04592, eq. 4.

The gradient passes through the weights of "dclw" and "hard", as in the code of the authors
(raminnakhli/Decoupled-Contrastive-Learning and joshr17/HCL on GitHub).

Options are keywords, see :class:`twoview.variants.LossOptions`.
"""

import math
from collections.abc import Callable
from typing import Any, Unpack, overload

import torch
from torch import Tensor

from twoview.streaming import RowLosses, Rows, known_keys, known_views, mean_loss
from twoview.variants import LossOptions, Variant, check_loss_arguments


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
    temperature: float | Tensor,
    *,
    variant: Variant = "infonce",
    same: Tensor | None = None,
    anchors: slice = slice(None),
    **options: Unpack[LossOptions],
) -> Tensor:
    """NT-Xent loss: the positive of each of the 2N views is the other view of the same image.

    All other views of the batch are negatives. SimCLR, Chen et al. 2020, arXiv:2002.05709, eq. 1 and Algorithm 1.

    Args:
        z_a: ``[N, D]`` embeddings of the first views, any floating dtype, not necessarily normalized.
        z_b: ``[N, D]`` embeddings of the second views; row i belongs to the same image as row i of ``z_a``.
        temperature: softmax temperature, > 0; a scalar tensor if it is learned.
        variant: form of the loss, see above.
        same: known positives, which are removed from the negatives. Either int ``[N]``, one id per image: images with
            equal ids >= 0 are positives of each other. Or a boolean ``[N, N]`` mask.
        anchors: images whose views are rows of the loss; the views of all images are negatives. One of several
            processes takes its own images, see :func:`twoview.distributed.own_rows`.
        **options: options of the losses, see above.

    Raises:
        ValueError: if shapes differ, an option is out of range, or the variant is unknown.

    Example:
        >>> nt_xent(torch.eye(4), torch.eye(4), temperature=0.5)
        tensor(0.5944)
    """
    _require_pairs("nt_xent", z_a, z_b)
    parameters = check_loss_arguments(temperature, variant, **options)
    n = len(z_a)
    with torch.autocast(z_a.device.type, enabled=False):  # bf16 logits lose digits at small temperatures
        z_2ND = l2_normalize(torch.cat([z_a, z_b]))
        images = torch.arange(n, device=z_a.device)[anchors]
        views = torch.cat([images, images + n])
        own = torch.stack([views, views.roll(len(images))], 1)
        rows = views % n
        known = None if same is None else known_views(same, rows, n)
        z, partners = z_2ND[views], z_2ND[own[:, 1]]
        if variant == "dclw":
            partners = partners * _weights((z_2ND[:n] * z_2ND[n:]).sum(1), parameters)[rows]
        return _contrast(z, partners, z_2ND, temperature, variant, parameters, own, known)


def info_nce(
    q: Tensor,
    k: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    *,
    variant: Variant = "infonce",
    same: Tensor | tuple[Tensor, Tensor] | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """InfoNCE loss with stored negatives; MoCo, He et al. 2020, arXiv:1911.05722, eq. 1.

    Args:
        q: ``[N, D]`` queries, any floating dtype, not necessarily normalized.
        k: ``[N, D]`` keys; row i is the positive of query i.
        negatives: ``[K, D]`` stored keys of earlier batches, which are the negatives of every query; K may be 0.
        temperature: softmax temperature, > 0; a scalar tensor if it is learned.
        variant: form of the loss, see above.
        same: known positives, which are removed from the negatives. Either ids int ``[N]`` of the queries and ids
            ``[K]`` of the stored keys: those with equal ids >= 0 are positives of each other. Or a boolean ``[N, K]``
            mask.
        **options: options of the losses, see above.

    Raises:
        ValueError: if shapes do not match, an option is out of range, or the variant is unknown.

    Example:
        >>> info_nce(torch.eye(2), torch.eye(2), negatives=-torch.eye(2), temperature=0.5)
        tensor(0.1429)
    """
    if q.shape != k.shape or q.ndim != 2 or negatives.ndim != 2 or negatives.shape[1] != q.shape[1]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, negatives))
        raise ValueError(f"info_nce needs q [N, D], k [N, D] and negatives [K, D], not {shapes}")
    parameters = check_loss_arguments(temperature, variant, **options)
    with torch.autocast(q.device.type, enabled=False):
        q_ND, k_ND, negatives_KD = l2_normalize(q), l2_normalize(k), l2_normalize(negatives)
        known = None if same is None else known_keys(same, len(q), len(negatives))
        if variant == "dclw":
            k_ND = k_ND * _weights((q_ND * k_ND).sum(1), parameters)
        return _contrast(q_ND, k_ND, negatives_KD, temperature, variant, parameters, None, known)


def moco_v3_loss(
    q_a: Tensor, k_b: Tensor, q_b: Tensor, k_a: Tensor, temperature: float | Tensor, anchors: slice = slice(None)
) -> Tensor:
    """MoCo v3 loss ``2T (batch_nce(q_a, k_b) + batch_nce(q_b, k_a))``; Chen et al. 2021, arXiv:2104.02057, Algorithm 1.

    Args:
        q_a: ``[N, D]`` predictions of the first views.
        k_b: ``[N, D]`` keys of the second views; detached. Row i of each argument belongs to image i.
        q_b: ``[N, D]`` predictions of the second views.
        k_a: ``[N, D]`` keys of the first views; detached.
        temperature: softmax temperature T, > 0.
        anchors: images whose queries are the rows of the loss, see :func:`nt_xent`.

    Raises:
        ValueError: if shapes differ or the temperature is out of range.

    Example:
        >>> moco_v3_loss(torch.eye(3), torch.eye(3), torch.eye(3), torch.eye(3), temperature=1.0)
        tensor(2.2058)
    """
    a_to_b = batch_nce(q_a, k_b.detach(), temperature, anchors)
    return 2 * temperature * (a_to_b + batch_nce(q_b, k_a.detach(), temperature, anchors))


def clip_loss(z_a: Tensor, z_b: Tensor, temperature: float | Tensor, anchors: slice = slice(None)) -> Tensor:
    """Mean of :func:`batch_nce` in both directions; CLIP, Radford et al. 2021, arXiv:2103.00020, figure 3.

    Args:
        z_a: ``[N, D]`` embeddings.
        z_b: ``[N, D]`` embeddings; row i is the positive of row i of ``z_a``.
        temperature: softmax temperature, > 0; a scalar tensor if it is learned.
        anchors: images whose embeddings are the rows of the loss, see :func:`nt_xent`.

    Raises:
        ValueError: if shapes differ or the temperature is out of range.

    Example:
        >>> clip_loss(torch.eye(3), torch.eye(3), temperature=1.0)
        tensor(0.5514)
    """
    return (batch_nce(z_a, z_b, temperature, anchors) + batch_nce(z_b, z_a, temperature, anchors)) / 2


def batch_nce(q: Tensor, k: Tensor, temperature: float | Tensor, anchors: slice = slice(None)) -> Tensor:
    """InfoNCE loss with in-batch negatives; Oord et al. 2018, arXiv:1807.03748, eq. 4.

    Args:
        q: ``[N, D]`` queries, any floating dtype, not necessarily normalized.
        k: ``[N, D]`` keys; row i is the positive of query i, the other rows are its negatives.
        temperature: softmax temperature, > 0; a scalar tensor if it is learned.
        anchors: images whose queries are the rows of the loss, see :func:`nt_xent`.

    Raises:
        ValueError: if shapes differ or the temperature is out of range.

    Example:
        >>> batch_nce(torch.eye(3), torch.eye(3), temperature=1.0)
        tensor(0.5514)
    """
    _require_pairs("batch_nce", q, k)
    parameters = check_loss_arguments(temperature)
    with torch.autocast(q.device.type, enabled=False):
        q_ND, k_ND = l2_normalize(q[anchors]), l2_normalize(k)
        own = torch.arange(len(k), device=k.device)[anchors]
        return _contrast(q_ND, k_ND[anchors], k_ND, temperature, "infonce", parameters, own[:, None])


def sup_con(
    z_a: Tensor, z_b: Tensor, labels: Tensor, temperature: float | Tensor, anchors: slice = slice(None)
) -> Tensor:
    """Supervised contrastive loss L_out (Khosla et al. 2020, arXiv:2004.11362, eq. 2), averaged over the 2N views.

    All views of the same class are positives of each other. If all labels differ, the loss equals :func:`nt_xent`.

    Args:
        z_a: ``[N, D]`` embeddings of the first views.
        z_b: ``[N, D]`` embeddings of the second views; row i belongs to the same image as row i of ``z_a``.
        labels: int64 ``[N]`` classes; a view with a negative label has one positive, the other view of the same image.
        temperature: softmax temperature, > 0; a scalar tensor if it is learned.
        anchors: images whose views are the rows of the loss, see :func:`nt_xent`.

    Raises:
        ValueError: if shapes do not match or the temperature is out of range.

    Example:
        >>> sup_con(torch.eye(4), torch.eye(4), labels=torch.tensor([0, 0, 1, -1]), temperature=0.5)
        tensor(1.2611)
    """
    _require_pairs("sup_con", z_a, z_b)
    if labels.shape != z_a.shape[:1]:
        raise ValueError(f"sup_con needs labels [{len(z_a)}], not {list(labels.shape)}")
    parameters, n = check_loss_arguments(temperature), len(z_a)
    with torch.autocast(z_a.device.type, enabled=False):
        z_2ND = l2_normalize(torch.cat([z_a, z_b]))
        # The mean logit of the positives is the logit of their mean. Row c of ``sums`` is the sum over all views of a
        # class, where c is the place of the class in the sorted labels, or of an image without a label.
        images = torch.arange(n, device=z_a.device)
        rows = torch.where(labels >= 0, torch.searchsorted(labels.sort().values, labels.contiguous()), n + images)
        sums = z_2ND.new_zeros(2 * n, z_2ND.shape[1]).index_put((rows.repeat(2),), z_2ND, accumulate=True)
        count = z_2ND.new_zeros(2 * n).index_put((rows,), z_2ND.new_full((n,), 2.0), accumulate=True)
        views = torch.cat([images[anchors], images[anchors] + n])
        z, classes = z_2ND[views], rows[views % n]
        positives = (sums[classes] - z) / (count[classes] - 1)[:, None]
        # "dcl": the sum of the denominator contains the positives already.
        return _contrast(z, positives, z_2ND, temperature, "dcl", parameters, views[:, None])


def _contrast(
    anchors: Tensor,
    positives: Tensor,
    candidates: Tensor,
    temperature: float | Tensor,
    variant: Variant,
    parameters: dict[str, Any],
    own: Tensor | None = None,
    same: Callable[[slice], Tensor] | None = None,
) -> Tensor:
    """Mean loss of ``anchors`` and ``positives`` ``[N, D]`` with the negatives ``candidates``; see :class:`Rows`."""
    beta, limit = parameters.get("beta", 0.0), parameters["mask_above"]

    def infonce(positive: Tensor, log_sums: list[Tensor], count: Tensor | None) -> RowLosses:
        chosen = torch.sigmoid(log_sums[0] - positive)  # probability of the negatives
        return torch.logaddexp(positive, log_sums[0]) - positive, -chosen, [chosen]

    def decoupled(positive: Tensor, log_sums: list[Tensor], count: Tensor | None) -> RowLosses:
        one = torch.ones_like(positive)
        return log_sums[0] - positive, -one, [one]

    def debiased(positive: Tensor, log_sums: list[Tensor], count: Tensor | None) -> RowLosses:
        assert count is not None
        log_count = count.clamp(min=1).to(positive.dtype).log()
        log_mean = log_sums[0] - (log_sums[1] if beta else log_count)
        log_g, slope, by_positive = _log_debiased(log_mean, positive, parameters["tau_plus"], -1 / temperature)
        loss, of_positive, (of_sum,) = infonce(positive, [log_g + log_count], None)
        return loss, of_positive + of_sum * by_positive, [of_sum * slope, -of_sum * slope][: len(log_sums)]

    forms = {"infonce": infonce, "dcl": decoupled, "dclw": decoupled, "debiased": debiased, "hard": debiased}
    rows = Rows(
        forms[variant],
        scales=(1 + beta, beta) if beta else (1.0,),
        counted=forms[variant] is debiased,
        own=own,
        same=same,
        above=None if limit is None else limit / temperature,
        products=parameters["products"] or "full",
    )
    # All logits of a row are products with the same rounded numbers, so that their differences are precise.
    queries = anchors / temperature
    return mean_loss(queries, candidates, (queries * positives).sum(1), rows)


def _weights(similarity: Tensor, parameters: dict[str, Any]) -> Tensor:
    """Weights ``[N, 1]`` of variant "dclw" from the similarities ``[N]`` of all positives."""
    return (2 - torch.softmax(similarity / parameters["sigma"], 0) * len(similarity))[:, None]


@overload
def chance_level(valid_negatives: int, variant: Variant = "infonce") -> float: ...
@overload
def chance_level(valid_negatives: Tensor, variant: Variant = "infonce") -> Tensor: ...
def chance_level(valid_negatives: Tensor | int, variant: Variant = "infonce") -> Tensor | float:
    """Loss if all similarities are equal: the mean of ``log(1 + n)``, or of ``log(n)`` for "dcl" and "dclw".

    Args:
        valid_negatives: number n of negatives, either equal for all rows or ``[N]``, one number per row.
        variant: form of the loss, see above.

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


def _log_debiased(
    log_mean: Tensor, positive: Tensor, tau_plus: float, floor: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``log max((exp(log_mean) - tau_plus exp(positive)) / (1 - tau_plus), exp(floor))``, computed in log space.

    Returns the value, and its derivatives by ``log_mean`` and by ``positive``.
    """
    gap = positive + (math.log(tau_plus) if tau_plus else -math.inf) - log_mean
    shrink = torch.log1p(-gap.clamp(max=0).exp())  # -inf where the difference is not positive
    value = log_mean + shrink - math.log1p(-tau_plus)
    above = value > floor
    slope = torch.where(above, -1 / torch.expm1(torch.where(above, gap, -1.0)), 0.0)
    return torch.where(above, value, floor), slope, torch.where(above, 1 - slope, 0.0)


def _require_pairs(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"{name} needs two [N, D] tensors of one shape, not {list(a.shape)} and {list(b.shape)}")
