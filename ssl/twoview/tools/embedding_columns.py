"""Columns that depend on all embeddings: coordinates of a map, and nearest neighbors, as Embedding Atlas shows them."""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twoview.data import fixed_sample
from twoview.devices import pick_device

log = logging.getLogger(__name__)

NEIGHBORS = 10  # neighbors of each image
UMAP_SAMPLE = 20_000  # largest number of vectors that a UMAP is fitted to; the others are placed by it
BLOCK = 4096  # vectors that are placed at once

Blocks = Callable[[], Iterator[np.ndarray]]  # vectors of all rows, fp32 [n, F] each


def map_kind() -> str:
    """Method of the map: "UMAP" if the extra ``umap`` is installed, else "PCA"."""
    return "UMAP" if importlib.util.find_spec("umap") else "PCA"


def map_coordinates(vectors: Tensor | None, blocks: Blocks, kind: str) -> np.ndarray:
    """Place each vector on a map of two dimensions.

    Args:
        vectors: fp32 ``[N, F]`` for UMAP, which is fitted to at most 20,000 of them, drawn at random.
        blocks: function that returns the vectors in blocks, for PCA by scikit-learn's ``IncrementalPCA``.
        kind: result of :func:`map_kind`.

    Returns:
        fp32 ``[N, 2]``.
    """
    if kind == "PCA":
        from sklearn.decomposition import IncrementalPCA

        found = IncrementalPCA(2)
        for block in _of_two_rows(blocks()):
            found.partial_fit(block)
        return np.concatenate([found.transform(block) for block in blocks()]).astype(np.float32)
    from umap import UMAP

    assert vectors is not None
    fitted = UMAP(n_neighbors=min(15, len(vectors) - 1), metric="cosine", random_state=0, n_jobs=1)
    sample = fixed_sample(len(vectors), UMAP_SAMPLE)
    points = np.empty((len(vectors), 2), np.float32)
    points[sample] = fitted.fit_transform(vectors[sample].numpy())
    others = torch.ones(len(vectors), dtype=torch.bool)
    others[sample] = False
    for rows in torch.nonzero(others).flatten().split(BLOCK):
        if len(rows):
            points[rows] = fitted.transform(vectors[rows].numpy())
    return points


def nearest_rows(vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows that are nearest to each row by cosine distance, which is 1 - cosine similarity.

    Args:
        vectors: fp32 ``[N, F]``.

    Returns:
        Rows int64 ``[N, k]`` and distances fp32 ``[N, k]``, nearest first, for k = 10, or N - 1 if that is less.
    """
    from twoview.evaluation.neighbors import neighbors

    k = min(NEIGHBORS, len(vectors) - 1)
    similarity, rows = neighbors(vectors, vectors, k + 1, pick_device())
    # A row is not its own neighbor; among equal vectors, it may be missing from the first k + 1.
    own = rows == torch.arange(len(vectors))[:, None]
    order = own.int().argsort(dim=1, stable=True)[:, :k]
    return rows.gather(1, order).numpy(), (1 - similarity.gather(1, order)).clamp(min=0).numpy()


def fields(columns: list[str]) -> list[tuple[str, Any]]:
    """Names and types in Arrow of the columns of this module that were asked for."""
    import pyarrow as pa

    found: list[tuple[str, Any]] = [("x", pa.float32()), ("y", pa.float32())] if "xy" in columns else []
    kind = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])
    return found + ([("neighbors", kind)] if "neighbors" in columns else [])


def arrays(
    points: np.ndarray | None, nearest: tuple[np.ndarray, np.ndarray] | None, start: int, stop: int
) -> Iterator[Any]:
    """Yield the columns of :func:`fields` for the rows from ``start`` to ``stop`` as Arrow arrays."""
    import pyarrow as pa

    if points is not None:
        yield from (pa.array(values) for values in points[start:stop].T.copy())
    if nearest is not None:
        parts = [values[start:stop] for values in nearest]
        offsets = pa.array(np.arange(len(parts[0]) + 1, dtype=np.int32) * parts[0].shape[1])
        lists = [pa.ListArray.from_arrays(offsets, pa.array(part.reshape(-1))) for part in parts]
        yield pa.StructArray.from_arrays(lists, ["ids", "distances"])


def _of_two_rows(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Join blocks until they have at least two rows, which ``partial_fit`` needs."""
    waiting: np.ndarray | None = None
    for block in blocks:
        waiting = block if waiting is None else np.concatenate([waiting, block])
        if len(waiting) >= 2 * BLOCK:
            yield waiting
            waiting = None
    if waiting is not None and len(waiting) > 1:
        yield waiting
