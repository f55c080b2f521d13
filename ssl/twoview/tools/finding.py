"""The vectors most similar to a query: exactly, or by a graph or lists whose recall is measured."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twoview.data import fixed_sample
from twoview.devices import pick_device
from twoview.metrics import knn_neighbors
from twoview.tools.approximate import Hnsw, IvfPq, left_out

log = logging.getLogger(__name__)

AT = 10  # neighbors of which the recall is measured
ONE_SIDED = 1.645  # standard errors below the mean, which the recall exceeds with a probability of 95 %
COMPARED = 2**25  # numbers of the candidates that queries are compared with at once
LARGE = 10  # exact search for more than one in so many vectors
BLOCK = 2**18  # vectors of which the removed ones are left out at once
EQUAL = 1e-6  # difference of similarities that counts as none

Found = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Vectors:
    """Vectors of an index, and what finds them.

    Args:
        vectors: fp32 or fp16 ``[N, D]`` of unit length or zero.
        alive: boolean ``[N]``, False for removed vectors; None if there are none.
        engine: graph or lists; None for exact search.
    """

    vectors: Tensor
    alive: Tensor | None
    engine: Hnsw | IvfPq | None

    def most_similar(self, queries: Tensor, k: int) -> Found:
        """Find the k most similar vectors.

        Args:
            queries: fp32 ``[Q, D]`` of unit length or zero.
            k: number of vectors, 0 to N without the removed ones.

        Returns:
            Cosine similarities fp32 ``[Q, k]`` and int64 positions ``[Q, k]``, most similar first.
        """
        if self.engine is None or not 0 < LARGE * k < len(self.vectors):
            return self._exact(queries, k)
        at_once = max(1, COMPARED // (max(100, 10 * k) * queries.shape[1]))
        parts = [self._compared(self.engine, part, k) for part in queries.split(at_once)]
        return torch.cat([similarity for similarity, _ in parts]), torch.cat([rows for _, rows in parts])

    def reach_recall(self, target: float) -> dict[str, Any] | None:
        """Search more of the graph or of the lists until the recall for new queries is as large as the target.

        Queries are vectors of the index that are left out of the search meanwhile, also as waypoints of a graph. With
        its own vectors in the graph, the recall would be higher than for new queries, since links lead to each vector
        from its nearest neighbors.

        Args:
            target: recall of the first 10 neighbors against exact search, in (0, 1]. It is reached if the mean of the
                queries exceeds it by 1.645 standard errors, or is 1.

        Returns:
            Number of neighbors ("at"), recall ("value"), numbers of queries and of vectors; None for exact search and
            for fewer than 20 vectors.
        """
        rows = torch.arange(len(self.vectors)) if self.alive is None else self.alive.nonzero().flatten()
        count = left_out(len(rows))
        if self.engine is None or not count:
            return None
        own, k, value = rows[fixed_sample(len(rows), count)], min(AT, len(rows) - count), 0.0
        queries, hidden = self.vectors[own].float(), torch.zeros(len(self.vectors), dtype=torch.bool)
        hidden[own] = True
        others = Vectors(self.vectors, ~hidden if self.alive is None else self.alive & ~hidden, self.engine)
        # Which of several equally similar vectors are found does not matter.
        least = others._exact(queries, k)[0][:, -1:] - EQUAL
        reached = False
        with self.engine.without(hidden):
            for effort in self.engine.efforts:
                self.engine.effort = effort
                found = (others.most_similar(queries, k)[0] >= least).double().mean(1)
                value, error = float(found.mean()), float(found.std(correction=0)) / math.sqrt(count)
                reached = value - ONE_SIDED * error >= target
                if reached:
                    break
        log.info("index: recall@%d is %.3f against exact search (%d vectors that were left out)", k, value, count)
        if not reached:
            log.warning("index: recall=%s is not reached; choose more links and construction, or kind=exact", target)
        return {"at": k, "value": value, "queries": count, "vectors": len(rows)}

    def _compared(self, engine: Hnsw | IvfPq, queries: Tensor, k: int) -> Found:
        """Compare queries with the vectors that the engine has found for them."""
        rows = engine.candidates(queries, k, self.alive)
        similarity = torch.einsum("qd,qcd->qc", queries, self.vectors[rows.clamp(min=0)].float())
        similarity, order = similarity.masked_fill(rows < 0, -torch.inf).topk(k)
        rows = rows.gather(1, order)
        short = similarity.isneginf().any(1)  # where removed vectors have hidden the others
        if short.any():
            similarity[short], rows[short] = self._exact(queries[short], k)
        return similarity, rows

    def _exact(self, queries: Tensor, k: int) -> Found:
        device = pick_device()
        if self.alive is None:
            return knn_neighbors(self.vectors, queries, k, device=device, unit=True)
        parts = []
        for start in range(0, len(self.vectors), BLOCK):
            rows = start + self.alive[start : start + BLOCK].nonzero().flatten()
            similarity, position = knn_neighbors(self.vectors[rows], queries, k, device=device, unit=True)
            parts.append((similarity, rows[position]))
        similarity, order = torch.cat([part for part, _ in parts], 1).topk(k)
        return similarity, torch.cat([rows for _, rows in parts], 1).gather(1, order)
