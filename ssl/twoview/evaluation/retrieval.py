"""Retrieval of images of the same class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twoview.errors import require_choice, require_positive
from twoview.evaluation.measure import ByName, Figures, Inputs, Measure, Workload
from twoview.evaluation.neighbors import UnitRows
from twoview.evaluation.progress import track
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
        return retrieval_figures(inputs.test, labels, gallery, self.ranks, device=inputs.device)

    def expected_seconds(self, work: Workload) -> float:
        """See :class:`Measure`."""
        return work.search(work.train if self.retrieval == "gallery" else work.test, work.test)

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
    device: torch.device | None = None,
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
            similarities, and at least 64 queries.
        device: device of the computation; None for that of the queries.

    Returns:
        * ``recall@K``, ``precision@K``, ``mean_reciprocal_rank`` and ``mean_average_precision``: see
          :mod:`twoview.metrics`. Each is a mean over the queries that have at least one relevant image; None if there
          is no such query;
        * ``queries``: number of queries that have at least one relevant image;
        * ``left_out``: number of queries without any relevant image.
    """
    device = device or queries.device
    bank, bank_labels = gallery or (queries, labels)
    unit, of_class = UnitRows(bank, device), _Classes(bank_labels, labels, device)
    sums: dict[str, float] = {}
    counted, chunk = 0, chunk or max(64, 2**22 // len(bank))
    for rows in track(torch.arange(len(queries)).split(chunk)):
        similarity = unit.similarities(l2_normalize(queries[rows].to(device)))
        found = _ranks(similarity, *of_class.members(labels[rows]), None if gallery is not None else rows.to(device))
        found = found[found[:, 0] < torch.inf]
        counted += len(found)
        for name, value in _sums(found, ranks).items():
            sums[name] = sums.get(name, 0.0) + value
    means = {name: total / counted if counted else None for name, total in sums.items()}
    return {**means, "queries": counted, "left_out": len(queries) - counted}


class _Classes:
    """Positions of the images of each class.

    Args:
        labels: int64 ``[M]``, classes of the images that are searched, >= 0.
        wanted: int64 ``[N]``, classes of the queries, >= 0.
        device: device of the results.
    """

    def __init__(self, labels: Tensor, wanted: Tensor, device: torch.device) -> None:
        self.counts = labels.bincount(minlength=1 + int(wanted.max())).to(device)
        self.starts = self.counts.cumsum(0) - self.counts
        self.order = labels.argsort(stable=True).to(device)

    def members(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Positions int64 ``[n, R]`` of the images of each class in ``wanted``, and which are valid, boolean.

        R is the largest number of images of a class, at least 1.
        """
        wanted = wanted.to(self.counts.device)
        counts = self.counts[wanted]
        places = torch.arange(max(1, int(counts.max())), device=counts.device)
        return self.order[(self.starts[wanted, None] + places).clamp(max=len(self.order) - 1)], places < counts[:, None]


def _ranks(similarity: Tensor, members: Tensor, valid: Tensor, itself: Tensor | None) -> Tensor:
    """Return the ranks of the relevant results in increasing order, float64 ``[n, R]`` on the CPU.

    Ranks are infinite where not valid. A relevant result comes after all irrelevant results that are at least as
    similar, and after the relevant results that are more similar. To count the former, similarities are sorted without
    their positions.

    Args:
        similarity: fp32 ``[n, M]``; overwritten.
        members: int64 ``[n, R]``, positions of the relevant results.
        valid: boolean ``[n, R]``, which of these positions are used.
        itself: int64 ``[n]``, position of the query among the results, which is left out; None if it is not there.
    """
    members = members.where(valid, members[:, :1])
    if itself is not None:
        valid = valid & (members != itself[:, None])
    theirs = similarity.gather(1, members).masked_fill_(~valid, -torch.inf).sort(1, descending=True).values
    similarity.scatter_(1, members, -torch.inf)
    if itself is not None:
        similarity.scatter_(1, itself[:, None], -torch.inf)
    if similarity.device.type == "cpu":
        similarity.numpy().sort(axis=1)  # several times faster than torch, which sorts positions too
    else:
        similarity = similarity.sort(1).values
    before = similarity.shape[1] - torch.searchsorted(similarity, theirs)
    places = torch.arange(1, theirs.shape[1] + 1, device=theirs.device)
    return (before + places).cpu().double().masked_fill_((theirs == -torch.inf).cpu(), torch.inf)  # no float64 on MPS


def _sums(found: Tensor, ranks: Sequence[int]) -> dict[str, float]:
    """Sum the metrics over queries, whose relevant results have the given ranks; see :func:`_ranks`."""
    if not len(found):
        return {}
    places = torch.arange(1, found.shape[1] + 1, device=found.device)
    return {
        **{f"recall@{k}": float((found[:, 0] <= k).sum()) for k in ranks},
        **{f"precision@{k}": float((found <= k).sum()) / k for k in ranks},
        "mean_reciprocal_rank": float((1 / found[:, 0]).sum()),
        "mean_average_precision": float(((places / found).sum(1) / (found < torch.inf).sum(1)).sum()),
    }
