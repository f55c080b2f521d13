"""Approximate search by faiss: the graph of HNSW, and the lists and codes of IVF-PQ.

Both are stored as plain tensors, which are checked when they are read. faiss's own reader, which trusts its input, is
not used.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.data import fixed_sample
from twoview.errors import require
from twoview.tools.graph_links import check_graph, without_links_to
from twoview.tools.index_settings import IndexSettings

BLOCK = 2**18  # vectors that are converted to fp32 at once
WIDTH = 4  # dimensions of a part of a vector that IVF-PQ stores in one byte
TRAINED = 40  # vectors for each list from which IVF-PQ learns
RECALL_QUERIES, LEFT_OUT = 500, 20  # the recall is measured with up to 500 vectors, and at most one in 20


def has_faiss() -> bool:
    """Whether faiss is installed."""
    return find_spec("faiss") is not None


def require_faiss(kind: str) -> None:
    """Raise :class:`UserError` if an index of this kind needs faiss, and it is not installed."""
    message = f'kind={kind}: needs faiss: pip install "twoview[faiss]"; or choose kind=exact'
    require(kind in ("auto", "exact") or has_faiss(), message)


def _faiss() -> Any:
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it reports the processor when it is imported
    import faiss

    return faiss


def left_out(vectors: int) -> int:
    """Number of vectors that the recall is measured with, the first ones of :func:`twoview.data.fixed_sample`."""
    return min(RECALL_QUERIES, vectors // LEFT_OUT)


def create(kind: str, dim: int, vectors: int, settings: IndexSettings) -> "Hnsw | IvfPq | None":
    """Create what finds neighbors in an index, without vectors; None for "exact" and for an index without vectors.

    Args:
        kind: "exact", "hnsw" or "ivfpq".
        dim: number of dimensions.
        vectors: number of vectors that will be added.
        settings: settings of the index.
    """
    if kind == "exact" or not vectors:
        return None
    if kind == "hnsw":
        return Hnsw(dim, settings.half, settings.links, settings.construction)
    return IvfPq(dim, min(2 * math.isqrt(vectors), vectors // TRAINED))


def restored(
    kind: str, vectors: Tensor, settings: IndexSettings, tensors: Mapping[str, Tensor], effort: int
) -> "Hnsw | IvfPq | None":
    """Create what finds neighbors in a stored index from its tensors, which may come from anyone.

    Raises:
        KeyError, ValueError: if a tensor is missing, is of another type, or leads to a vector that does not exist.
        UserError: if faiss is missing.
    """
    if kind == "exact" or not len(vectors):
        return None
    require_faiss(kind)
    dim = vectors.shape[1]
    if kind == "ivfpq" and (tensors["means"].ndim != 2 or not tensors["means"].numel()):
        raise ValueError("there are no lists")  # or a number of them that takes no space in the file
    engine = create("hnsw", dim, 1, settings) if kind == "hnsw" else IvfPq(dim, len(tensors["means"]))
    assert engine is not None
    engine.restore(tensors, vectors)
    engine.effort = effort
    return engine


class Hnsw:
    """Graph of vectors by inner product, and the vectors.

    Malkov & Yashunin 2016, arXiv:1603.09320.

    Args:
        dim: number D of dimensions.
        half: whether vectors are held in fp16 instead of fp32.
        links: links of each vector (M in the paper); twice as many on the lowest level.
        construction: vectors that are considered for the links of a new one (efConstruction).

    Attributes:
        effort: vectors that a search considers at least (efSearch).
    """

    def __init__(self, dim: int, half: bool, links: int, construction: int) -> None:
        faiss = _faiss()
        self.dim, self.half, self.effort = dim, half, self.efforts[0]
        if half:
            kind = faiss.ScalarQuantizer.QT_fp16
            self.graph = faiss.IndexHNSWSQ(dim, kind, links, faiss.METRIC_INNER_PRODUCT)
        else:
            self.graph = faiss.IndexHNSWFlat(dim, links, faiss.METRIC_INNER_PRODUCT)
        self.graph.hnsw.efConstruction = construction

    @property
    def efforts(self) -> tuple[int, ...]:
        """Values of ``effort`` to choose from, the fastest first."""
        return (32, 64, 128, 256, 512, 1024)

    def add(self, vectors: Tensor) -> None:
        """Add fp32 or fp16 ``[N, D]`` vectors."""
        require(self.graph.ntotal + len(vectors) < 2**31, "kind=hnsw: holds at most 2,147,483,647 vectors")
        for part in _blocks(vectors):
            self.graph.add(part)

    def vectors(self) -> Tensor:
        """Return the vectors ``[N, D]`` as they are held; valid until vectors are added or the graph is deleted."""
        faiss = _faiss()
        storage = faiss.downcast_index(self.graph.storage)
        if not self.graph.ntotal:
            return torch.empty(0, self.dim, dtype=torch.float16 if self.half else torch.float32)
        bytes_of_all = faiss.rev_swig_ptr(storage.codes.data(), self.graph.ntotal * storage.code_size)
        return torch.from_numpy(bytes_of_all.view(np.float16 if self.half else np.float32).reshape(-1, self.dim))

    def candidates(self, queries: Tensor, k: int, alive: Tensor | None) -> Tensor:
        """Find vectors that are probably the nearest.

        Args:
            queries: fp32 ``[Q, D]`` of unit length.
            k: number of vectors.
            alive: boolean ``[N]``, vectors that may be found; None for all.

        Returns:
            int64 ``[Q, k]`` positions, -1 where no further vector was found.
        """
        selector = _selector(alive)  # faiss does not keep it alive
        options = _faiss().SearchParametersHNSW(efSearch=max(self.effort, 2 * k), sel=selector)
        return torch.from_numpy(self.graph.search(_fp32(queries), k, params=options)[1])

    def without(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Keep searches away from some vectors, boolean ``[N]``, as if they were not in the graph.

        The vector at which searches start stays; which links the others have was chosen with all vectors.
        """
        faiss, graph = _faiss(), self.graph.hnsw
        links = faiss.rev_swig_ptr(graph.neighbors.data(), graph.neighbors.size())
        tables = (faiss.vector_to_array(array) for array in (graph.offsets, graph.cum_nneighbor_per_level))
        return without_links_to(hidden.numpy(), links, *tables)

    def tensors(self) -> dict[str, Tensor]:
        """Return the graph: int32 ``[N]`` numbers of levels, int32 links, and the position at which a search starts."""
        faiss, graph = _faiss(), self.graph.hnsw
        return {
            "entry": torch.tensor([graph.entry_point]),
            "levels": torch.from_numpy(faiss.vector_to_array(graph.levels)),
            "links": torch.from_numpy(faiss.vector_to_array(graph.neighbors)),
        }

    def restore(self, tensors: Mapping[str, Tensor], vectors: Tensor) -> None:
        """Take the graph that :meth:`tensors` has returned, and its vectors, into an empty graph.

        Raises:
            ValueError: if a link leads to a vector that does not exist, or the tensors do not fit each other.
        """
        faiss, graph = _faiss(), self.graph.hnsw
        entry, levels, links = (tensors[name].numpy() for name in ("entry", "levels", "links"))
        table = faiss.vector_to_array(graph.cum_nneighbor_per_level)  # links of a vector below each level
        offsets = check_graph(entry, levels, links, table, len(vectors))
        for part in _blocks(vectors):
            self.graph.storage.add(part)
        self.graph.ntotal = len(vectors)
        for array, target in ((levels, graph.levels), (offsets, graph.offsets), (links, graph.neighbors)):
            faiss.copy_array_to_vector(array, target)
        graph.entry_point = int(entry[0])
        graph.max_level = int(levels.max(initial=0)) - 1


class IvfPq:
    """Lists of similar vectors, and codes of their differences from the means of the lists.

    Jégou et al. 2011, doi:10.1109/TPAMI.2010.57. A code takes a byte for every 4 dimensions.

    Args:
        dim: number D of dimensions.
        lists: number of lists.

    Attributes:
        effort: number of lists that are searched (nprobe).
    """

    def __init__(self, dim: int, lists: int) -> None:
        faiss = _faiss()
        self.lists, self.parts = lists, math.ceil(dim / WIDTH)
        self.effort = self.efforts[0]
        self.pad = self.parts * WIDTH - dim
        width, metric = self.parts * WIDTH, faiss.METRIC_INNER_PRODUCT
        self.quantizer = faiss.IndexFlatIP(width)
        self.codes = faiss.IndexIVFPQ(self.quantizer, width, lists, self.parts, 8, metric)
        # With few vectors, faiss prints warnings instead of learning less well without them.
        self.codes.cp.min_points_per_centroid = self.codes.pq.cp.min_points_per_centroid = 1

    @property
    def efforts(self) -> tuple[int, ...]:
        """Values of ``effort`` to choose from, the fastest first."""
        return (*(2**i for i in range(2, 10) if 2**i < self.lists), self.lists)

    def add(self, vectors: Tensor) -> None:
        """Add fp32 or fp16 ``[N, D]`` vectors.

        Means and codes are learned from the first vectors that are added, except those that measure the recall.
        """
        if not self.codes.is_trained:
            order, used = fixed_sample(len(vectors), len(vectors)), max(TRAINED * self.lists, 10_000)
            self.codes.train(self._padded(vectors[order[left_out(len(vectors)) :][:used]]))
        for part in vectors.split(BLOCK):
            self.codes.add(self._padded(part))

    def candidates(self, queries: Tensor, k: int, alive: Tensor | None) -> Tensor:
        """Find vectors that are probably the nearest, as :meth:`Hnsw.candidates` does."""
        selector = _selector(alive)
        options = _faiss().SearchParametersIVF(nprobe=self.effort, sel=selector)
        # Codes are inexact, so that more of them are compared by their vectors afterwards.
        return torch.from_numpy(self.codes.search(self._padded(queries), max(100, 10 * k), params=options)[1])

    def without(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Do nothing: lists and codes of vectors do not depend on other vectors, once the means are learned."""
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Return the means of the lists, the vectors that codes stand for, and list and codes of each vector."""
        faiss, inverted = _faiss(), self.codes.invlists
        lists = np.empty(self.codes.ntotal, np.int32)
        codes = np.empty((self.codes.ntotal, self.parts), np.uint8)
        for number in range(self.lists):
            if size := inverted.list_size(number):
                rows = faiss.rev_swig_ptr(inverted.get_ids(number), size)
                lists[rows] = number
                codes[rows] = faiss.rev_swig_ptr(inverted.get_codes(number), size * self.parts).reshape(size, -1)
        means = self.quantizer.reconstruct_n(0, self.lists)
        books = faiss.vector_to_array(self.codes.pq.centroids)
        return {
            "means": torch.from_numpy(means),
            "books": torch.from_numpy(books),
            "lists": torch.from_numpy(lists),
            "codes": torch.from_numpy(codes),
        }

    def restore(self, tensors: Mapping[str, Tensor], vectors: Tensor) -> None:
        """Take what :meth:`tensors` has returned for the vectors.

        Raises:
            ValueError: if a vector is in a list that does not exist, or the tensors do not fit each other.
        """
        faiss, count = _faiss(), len(vectors)
        for name, dtype, shape in (
            ("means", torch.float32, (self.lists, self.parts * WIDTH)),
            ("books", torch.float32, (256 * self.parts * WIDTH,)),
            ("lists", torch.int32, (count,)),
            ("codes", torch.uint8, (count, self.parts)),
        ):
            found = tensors[name]
            if found.dtype != dtype or found.shape != shape:
                raise ValueError(f"{name} is {found.dtype} {list(found.shape)}")
            if dtype == torch.float32 and not found.isfinite().all():
                raise ValueError(f"{name} is not finite")
        lists, codes = tensors["lists"].numpy(), tensors["codes"].numpy()
        if not 0 <= lists.min(initial=0) <= lists.max(initial=0) < self.lists:
            raise ValueError("a vector is in no list")
        self.quantizer.add(_fp32(tensors["means"]))
        faiss.copy_array_to_vector(tensors["books"].numpy(), self.codes.pq.centroids)
        self.codes.is_trained = True
        order, ends = np.argsort(lists, kind="stable"), np.cumsum(np.bincount(lists, minlength=self.lists))
        for number, rows in enumerate(np.split(order, ends[:-1])):
            own = np.ascontiguousarray(codes[rows])
            inverted, pointers = self.codes.invlists, (faiss.swig_ptr(rows), faiss.swig_ptr(own))
            inverted.add_entries(number, len(rows), *pointers)
        self.codes.ntotal = count

    def _padded(self, vectors: Tensor) -> np.ndarray:
        """The vectors with zeros up to a multiple of the dimensions of a part."""
        return _fp32(F.pad(vectors.float(), (0, self.pad)))


def _fp32(vectors: Tensor) -> np.ndarray:
    array: np.ndarray = vectors.float().contiguous().numpy()
    return array


def _blocks(vectors: Tensor) -> Iterator[np.ndarray]:
    """Vectors as fp32; those that are not fp32 in blocks, so that they are not copied as a whole."""
    for part in (vectors,) if vectors.dtype == torch.float32 else vectors.split(BLOCK):
        yield _fp32(part)


def _selector(alive: Tensor | None) -> Any:
    if alive is None:
        return None
    return _faiss().IDSelectorBitmap(np.packbits(alive.numpy(), bitorder="little"))
