"""Retrieval of images of the same class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from twoview import metrics
from twoview.errors import require_choice, require_positive
from twoview.evaluation.measure import ByName, Figures, Inputs, Measure
from twoview.evaluation.tables import Table, figures_table
from twoview.losses import l2_normalize


@dataclass(frozen=True)
class Retrieval(Measure):
    """Each test image is a query for images of its class, ranked by cosine similarity.

    Args:
        retrieval: "leave_one_out" searches among the other test images, "gallery" searches among the training images.
        ranks: numbers K of results for recall@K and precision@K, > 0.

    Raises:
        UserError: if a value is out of range.
    """

    name = "retrieval"

    retrieval: Literal["leave_one_out", "gallery"] = "leave_one_out"
    ranks: Sequence[int] = (1, 5, 10)

    def __post_init__(self) -> None:
        require_choice("eval", ("leave_one_out", "gallery"), retrieval=self.retrieval)
        require_positive("eval", ranks=self.ranks)

    def score(self, chosen: None, inputs: Inputs, labels: Tensor) -> Figures:
        """Return the metrics of :func:`retrieval_figures`."""
        gallery = inputs.train if self.retrieval == "gallery" else None
        return retrieval_figures(inputs.test, labels, gallery, self.ranks)

    def table(self, columns: ByName, report: ByName) -> Table:
        """Return a table of all metrics."""
        where = "training images" if report["protocol"].get("retrieval") == "gallery" else "the other test images"
        note = f"Each test image is a query for images of its class among {where}, by cosine similarity."
        return figures_table("Retrieval", columns, note)


def retrieval_figures(
    queries: Tensor,
    labels: Tensor,
    gallery: tuple[Tensor, Tensor] | None = None,
    ranks: Sequence[int] = (1, 5, 10),
    chunk: int = 0,
) -> Figures:
    """Compute metrics of the retrieval of images of the same class by cosine similarity.

    Of results with equal similarity, results of other classes are ranked first. Uninformative features therefore gain
    nothing from the order of the files.

    Args:
        queries: fp32 ``[N, F]``, features of the queries.
        labels: int64 ``[N]``, classes of the queries.
        gallery: features fp32 ``[M, F]`` and classes int64 ``[M]`` of the images that are searched. None searches for
            each query among the other queries, with M = N.
        ranks: numbers K of results for recall and precision.
        chunk: number of queries per step, which bounds memory to ``chunk * M`` similarities; 0 for about four million
            similarities.

    Returns:
        * ``recall@K``, ``precision@K``, ``mean_reciprocal_rank`` and ``mean_average_precision``: see
          :mod:`twoview.metrics`. Each is a mean over the queries that have at least one relevant image; None if there
          is no such query;
        * ``queries``: number of queries that have at least one relevant image;
        * ``left_out``: number of queries without any relevant image.
    """
    bank, bank_labels = gallery or (queries, labels)
    bank = l2_normalize(bank)
    sums: dict[str, float] = {}
    counted, chunk = 0, chunk or max(1, 2**22 // len(bank))
    for start in range(0, len(queries), chunk):
        similarity = l2_normalize(queries[start : start + chunk]) @ bank.T
        relevant = labels[start : start + chunk, None] == bank_labels
        if gallery is None:
            itself = torch.arange(len(similarity))
            relevant[itself, start + itself] = False
            similarity[itself, start + itself] = -torch.inf
        has_any = relevant.any(1)
        ranked = _ranked(similarity[has_any], relevant[has_any])
        counted += len(ranked)
        figures = {
            **{f"recall@{k}": metrics.recall_at_k(ranked, k) for k in ranks},
            **{f"precision@{k}": metrics.precision_at_k(ranked, k) for k in ranks},
            "mean_reciprocal_rank": metrics.mean_reciprocal_rank(ranked),
            "mean_average_precision": metrics.mean_average_precision(ranked),
        }
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + (value * len(ranked) if len(ranked) else 0.0)
    means = {name: total / counted if counted else None for name, total in sums.items()}
    return {**means, "queries": counted, "left_out": len(queries) - counted}


def _ranked(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Return relevance in order of decreasing similarity; of equally similar results, irrelevant ones come first."""
    # Sort integers whose upper bits are the similarity, in its order, and whose last bit is 1 for irrelevant results.
    bits = (similarity.float() + 0.0).numpy().view(np.int32).astype(np.int64)
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 1) | ~relevant.numpy()
    keys.sort(axis=1)
    return torch.from_numpy(keys[:, ::-1] & 1 == 0)
