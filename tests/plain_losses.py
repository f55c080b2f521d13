"""The contrastive losses with a whole similarity matrix and autograd, to compare with."""

import math

import torch
from torch.nn.functional import normalize, softmax


def row_losses(positive, similarity, valid, temperature, variant="infonce", sigma=0.5, tau_plus=0.1, beta=1.0):
    """Loss of each row ``[N]``; ``valid`` ``[N, M]`` marks the negatives. Each row needs one."""
    s, count = positive / temperature, valid.sum(1)

    def log_sum(scale):
        return (scale * similarity / temperature).masked_fill(~valid, -math.inf).logsumexp(1)

    if variant == "infonce":
        return torch.logaddexp(s, log_sum(1)) - s
    if variant == "dcl":
        return log_sum(1) - s
    if variant == "dclw":
        return log_sum(1) - (2 - softmax(positive / sigma, 0) * len(positive)) * s
    log_mean = log_sum(1) - count.double().log() if variant == "debiased" else log_sum(1 + beta) - log_sum(beta)
    g = ((log_mean.exp() - tau_plus * s.exp()) / (1 - tau_plus)).clamp(min=math.exp(-1 / temperature))
    return torch.log(s.exp() + count * g) - s


def nt_xent(z_a, z_b, temperature, variant="infonce", same=None, mask_above=None, **parameters):
    """NT-Xent; ``same`` is a boolean ``[N, N]``."""
    n = len(z_a)
    z = normalize(torch.cat([z_a, z_b]), dim=1)
    similarity = z @ z.T
    known = torch.eye(n, dtype=torch.bool) if same is None else same | torch.eye(n, dtype=torch.bool)
    valid = ~known.repeat(2, 2)
    if mask_above is not None:
        valid &= similarity <= mask_above
    positive = similarity[torch.arange(2 * n), torch.arange(2 * n).roll(n)]
    return row_losses(positive, similarity, valid, temperature, variant, **parameters).mean()


def info_nce(q, k, negatives, temperature, variant="infonce", same=None, mask_above=None, **parameters):
    """InfoNCE with stored negatives; ``same`` is a boolean ``[N, K]``."""
    q, k, negatives = (normalize(x, dim=1) for x in (q, k, negatives))
    similarity = q @ negatives.T
    valid = torch.ones_like(similarity, dtype=torch.bool) if same is None else ~same
    if mask_above is not None:
        valid &= similarity <= mask_above
    return row_losses((q * k).sum(1), similarity, valid, temperature, variant, **parameters).mean()


def sup_con(z_a, z_b, labels, temperature):
    """L_out of SupCon."""
    z = normalize(torch.cat([z_a, z_b]), dim=1)
    own = torch.eye(len(z), dtype=torch.bool)
    known = (labels[:, None] == labels) & (labels >= 0) | torch.eye(len(labels), dtype=torch.bool)
    positives = known.repeat(2, 2) & ~own
    logits = (z @ z.T / temperature).masked_fill(own, -math.inf)
    log_p = logits - logits.logsumexp(1, keepdim=True)
    return -(log_p.masked_fill(~positives, 0).sum(1) / positives.sum(1)).mean()
