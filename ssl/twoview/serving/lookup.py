"""Vectors and neighbors of decoded images, computed in batches."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twoview.encoder import Encoder
from twoview.serving.metrics import Metrics
from twoview.tools.index import Index, Neighbors


class Query(NamedTuple):
    """A decoded image, uint8 ``[C, image_size, image_size]``, and the number of its neighbors, 0 for its vector."""

    pixels: Tensor
    k: int


class Lookup:
    """Computes the features of images and searches an index for their neighbors.

    Args:
        encoder: the network of the index, with its preprocessing.
        index: the index; not changed meanwhile.
        metrics: sizes and seconds of batches are added.
    """

    def __init__(self, encoder: Encoder, index: Index, metrics: Metrics) -> None:
        self.encoder, self.index, self.metrics = encoder.folded(), index, metrics

    def __call__(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """Return the answer to each query as plain values: ``vector`` or ``neighbors``, most similar first."""
        start = time.perf_counter()
        pixels = torch.stack([query.pixels for query in queries])
        features = self.encoder.apply_network(self.encoder.preprocess.normalized(pixels)).cpu()
        answers: list[dict[str, Any]] = [{"vector": vector} for vector in features.tolist()]
        for k in {query.k for query in queries if query.k}:
            rows = [row for row, query in enumerate(queries) if query.k == k]
            found = self.index.search(self.index.checkpoint, features[rows], k)
            for i, row in enumerate(rows):
                answers[row] = {"neighbors": _neighbors(found, i)}
        self.metrics.batch.observe(len(queries))
        self.metrics.encoder_seconds.observe(time.perf_counter() - start)
        return answers


def _neighbors(found: Neighbors, row: int) -> list[dict[str, Any]]:
    columns = (found.ids[row].tolist(), found.similarity[row].tolist(), found.paths[row], found.labels[row])
    return [
        {"id": number, "similarity": similarity, "path": path, "label": label, "thumbnail": f"thumbnails/{number}"}
        for number, similarity, path, label in zip(*columns, strict=True)
    ]
