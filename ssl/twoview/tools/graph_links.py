"""Links of a graph of HNSW as faiss stores them: checked, and hidden for a measurement.

The links of all vectors are one int32 array. A vector has ``table[level + 1] - table[level]`` of them on each of its
levels, the lowest level first. Those that lead to no vector are -1 and come last on their level.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

BLOCK = 2**22  # links that are looked up at once


def check_graph(entry: np.ndarray, levels: np.ndarray, links: np.ndarray, table: np.ndarray, count: int) -> np.ndarray:
    """Refuse a graph that a search would leave.

    Args:
        entry: int64 ``[1]``, vector at which a search starts.
        levels: int32 ``[N]``, number of levels of each vector.
        links: int32, links of all vectors.
        table: number of links of a vector below each level.
        count: number N of vectors.

    Returns:
        uint64 ``[N + 1]``, position of the first link of each vector, and the end.

    Raises:
        ValueError: if a link leads to a vector that does not exist, or the arrays do not fit each other.
    """
    for name, array, dtype, shape in (
        ("entry", entry, np.int64, (1,)),
        ("levels", levels, np.int32, (count,)),
        ("links", links, np.int32, links.shape[:1]),
    ):
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
    if not count:
        raise ValueError("a graph without vectors")
    if not 1 <= levels.min() <= levels.max() < len(table):
        raise ValueError("a number of levels is out of range")
    offsets = np.concatenate([[0], np.cumsum(table[levels], dtype=np.int64)]).astype(np.uint64)
    if offsets[-1] != len(links):
        raise ValueError(f"{len(links)} links instead of {offsets[-1]}")
    if not -1 <= links.min() <= links.max() < count:
        raise ValueError("a link leads to no vector")
    if not 0 <= entry[0] < count or levels[entry[0]] != levels.max():
        raise ValueError("the search starts at no vector of the highest level")
    for level in range(1, int(levels.max())):  # links of a level lead to vectors that have this level
        starts = offsets[:-1][levels > level].astype(np.int64)
        targets = links[starts[:, None] + np.arange(table[level], table[level + 1])]
        if (levels[targets[targets >= 0]] <= level).any():
            raise ValueError(f"a link of level {level} leads to a vector below")
    return offsets


@contextmanager
def without_links_to(hidden: np.ndarray, links: np.ndarray, offsets: np.ndarray, table: np.ndarray) -> Iterator[None]:
    """Leave the links to some vectors out of a graph, so that no search passes these vectors; restore them afterwards.

    Args:
        hidden: boolean ``[N]``, vectors that no link shall lead to.
        links: int32, links of all vectors; changed in place until the end.
        offsets: ``[N + 1]``, position of the first link of each vector, and the end.
        table: number of links of a vector below each level.
    """
    looked_up = np.append(hidden, False)  # the last entry is for links of -1
    blocks = range(0, len(links), BLOCK)
    found = np.concatenate([start + np.nonzero(looked_up[links[start : start + BLOCK]])[0] for start in blocks])
    first = offsets.astype(np.int64)[np.searchsorted(offsets, found.astype(np.uint64), "right") - 1]
    levels = np.searchsorted(table, found - first, "right") - 1
    changed = []
    for level in np.unique(levels):
        starts = np.unique(first[levels == level] + table[level])
        places = starts[:, None] + np.arange(table[level + 1] - table[level])
        before = links[places]
        gone = looked_up[before] | (before < 0)
        after = np.take_along_axis(np.where(gone, -1, before), np.argsort(gone, axis=1, kind="stable"), 1)
        changed.append((places, before))
        links[places] = after
    try:
        yield
    finally:
        for places, before in changed:
            links[places] = before
