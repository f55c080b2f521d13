"""Search for the most similar images by their embeddings."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twoview.encoder import Encoder
from twoview.errors import UserError, require
from twoview.tools.approximate import Hnsw, IvfPq, create, has_faiss, require_faiss, restored
from twoview.tools.embedding_file import Embeddings
from twoview.tools.entries import Entries, Texts
from twoview.tools.finding import Vectors
from twoview.tools.incoming import (
    Source,
    as_embeddings,
    checkpoint_of,
    network_of,
    require_same_preprocessing,
    unit_vectors,
    with_preprocessing,
)
from twoview.tools.index_file import StoredIndex, read_index, write_index
from twoview.tools.index_settings import IVFPQ_FROM, IndexSettings

log = logging.getLogger(__name__)

DEAD_SHARE = 0.2  # largest share of removed vectors in a graph or in lists


class Neighbors(NamedTuple):
    """The most similar entries of each query, most similar first.

    Attributes:
        similarity: fp32 ``[Q, k]`` cosine similarities.
        ids: int64 ``[Q, k]``.
        paths: paths of the images, empty where unknown.
        labels: labels of the images, empty where unknown.
    """

    similarity: Tensor
    ids: Tensor
    paths: list[list[str]]
    labels: list[list[str]]


class Index:
    """Embeddings of images of one network, among which the most similar ones to a query are found.

    Create it by :meth:`build` or :meth:`load`. It is not changed and searched at the same time by several threads.

    Attributes:
        kind: "exact", "hnsw" or "ivfpq".
        settings: settings of the index.
        checkpoint: hash of the weights of the network.
        card: model card of the network as plain values; empty if it is not known.
        source: file or name that the network was loaded from; empty if it is not known.
        recall: recall of the first 10 neighbors against exact search ("value"), number of stored vectors that were left
            out of the search and served as queries ("queries"), number of vectors then ("vectors"); None for "exact",
            for fewer than 20 vectors, and for an index of an earlier version until it is saved again.

    Example:
        >>> from twoview import load
        >>> encoder = load("random:test_resnet", image_size=32)
        >>> images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
        >>> index = Index.build(encoder, images)
        >>> index.search(encoder, images[3], k=2).ids[0, 0]
        tensor(3)
        >>> index.add(encoder, images[:2].flip(3)), index.remove([3, 4]), len(index)
        (tensor([20, 21]), 2, 20)
        >>> index.save(f"{folder}/pictures.index")
        >>> len(Index.load(f"{folder}/pictures.index"))
        20
    """

    def __init__(self, content: StoredIndex) -> None:
        self.settings, self.kind, self.recall = content.settings, content.kind, content.recall
        self.checkpoint, self.card, self.source = content.checkpoint, content.card, content.source
        self._entries, self._alive, self._next_id = content.entries, content.alive, content.next_id
        self._engine: Hnsw | IvfPq | None = None
        # Whether ``recall`` is that of the current entries.
        self._measured = self.kind == "exact" or self.recall is not None

    @classmethod
    def build(
        cls,
        encoder: Encoder | str | None,
        source: Source,
        settings: IndexSettings = IndexSettings(),  # noqa: B008 (frozen)
        ids: Sequence[int] | Tensor | None = None,
    ) -> "Index":
        """Build an index.

        Args:
            encoder: the network; or the hash of its weights, for vectors; or None for embeddings that hold this hash.
            source: images in any form that the encoder takes; fp ``[N, D]`` vectors; the path of a Parquet file of
                embeddings; or :class:`twoview.tools.embedding_file.Embeddings`.
            settings: settings of the index.
            ids: N different numbers >= 0; None for 0 to N - 1.

        Raises:
            UserError: if the vectors are of another network or are not finite, an id is given twice, or faiss is
                missing.
        """
        require_faiss(settings.kind)
        found = as_embeddings(encoder, source)
        count, dim = found.vectors.shape
        message = f"needs at least {IVFPQ_FROM:,} vectors, there are {count:,}; choose kind=exact or kind=hnsw"
        require(settings.kind != "ivfpq" or count >= IVFPQ_FROM, f"kind=ivfpq: {message}")
        empty = Entries(
            unit_vectors(torch.empty(0, dim), settings.half), torch.empty(0).long(), Texts.of([]), Texts.of([])
        )
        same: dict[str, Any] = network_of(found)
        index = cls(StoredIndex(empty, None, {}, 1, "exact", settings, recall=None, next_id=0, **same))
        index._entries = index._new_entries(found, ids)
        del found
        index.rebuild()
        return index

    @classmethod
    def load(cls, path: str | Path) -> "Index":
        """Load an index. Its vectors are mapped into memory, and stay valid when the file is replaced.

        Raises:
            UserError: if it cannot be read, is damaged, or needs faiss and faiss is missing.
        """
        stored = read_index(path)
        index = cls(stored)
        try:
            index._engine = restored(
                stored.kind, stored.entries.vectors, stored.settings, stored.found_by, stored.effort
            )
        except (KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"index={path}: cannot be searched ({error}); build it again with task=index") from error
        index._share_vectors()
        return index

    def save(self, path: str | Path) -> None:
        """Write the index to one file, which replaces an existing one by one rename.

        If entries have been added or removed since the recall was measured, it is measured again.

        Raises:
            OSError: if the folder cannot be written or the disk is full; an existing file is then unchanged.
        """
        if not self._measured:
            self._reach_recall()
        engine = self._engine
        content = StoredIndex(
            self._entries,
            self._alive,
            {} if engine is None else engine.tensors(),
            1 if engine is None else engine.effort,
            self.kind,
            self.settings,
            self.checkpoint,
            self.card,
            self.source,
            self.recall,
            self._next_id,
        )
        write_index(Path(path).expanduser(), content)

    def __len__(self) -> int:
        return len(self._entries) if self._alive is None else int(self._alive.sum())

    @property
    def dim(self) -> int:
        """Number of dimensions of the vectors."""
        return self._entries.vectors.shape[1]

    @property
    def ids(self) -> Tensor:
        """Ids of all entries, int64 ``[N]``, in the order in which they were added."""
        return self._entries.ids if self._alive is None else self._entries.ids[self._alive]

    @property
    def paths(self) -> Texts:
        """Paths of all entries in the same order, empty where unknown."""
        paths = self._entries.paths
        return paths if self._alive is None else paths.where(self._alive.numpy())

    def add(self, encoder: Encoder | str | None, source: Source, ids: Sequence[int] | Tensor | None = None) -> Tensor:
        """Add entries; the result is that of an index built from all entries.

        Args:
            encoder: as for :meth:`build`.
            source: as for :meth:`build`.
            ids: numbers that are not in the index; None for numbers that were never given before.

        Returns:
            int64 ``[N]``, the ids of the entries.

        Raises:
            UserError: if the vectors are of another network or are not finite, or an id is in the index already. The
                index is then unchanged.
        """
        new = self._new_entries(self._of_this_network(encoder, source), ids)
        if len(new):
            if self._engine is not None:
                self._engine.add(new.vectors)
            held = self._engine.vectors() if isinstance(self._engine, Hnsw) else None
            self._entries = self._entries.followed_by(new, held)
            if self._alive is not None:
                self._alive = torch.cat([self._alive, torch.ones(len(new), dtype=torch.bool)])
            self._measured = self._engine is None
            kind = self.settings.resolved(len(self), has_faiss())
            if kind != self.kind or (kind != "exact" and self._engine is None):
                self.rebuild()
        return new.ids

    def remove(self, which: Sequence[int] | Sequence[str] | Tensor) -> int:
        """Remove entries.

        A graph and lists keep the removed vectors, which are not found any more, until they are more than a fifth.

        Args:
            which: ids; or paths, all entries of which are removed.

        Returns:
            Number of removed entries.

        Raises:
            UserError: if there is no such entry. The index is then unchanged.
        """
        gone = self._rows_of(list(getattr(which, "tolist", lambda: which)()))
        alive = ~gone if self._alive is None else self._alive & ~gone
        removed = len(self) - int(alive.sum())
        if removed:
            self._alive, self._measured = alive, self._engine is None
            if self._engine is None or int(alive.sum()) < (1 - DEAD_SHARE) * len(alive):
                self.rebuild()
        return removed

    def rebuild(self) -> None:
        """Build the index anew from its entries, without the vectors of removed ones."""
        entries = self._entries if self._alive is None else self._entries.where(self._alive)
        kind = self.settings.resolved(len(entries), has_faiss())
        if self.settings.kind == "auto" and kind != self.settings.resolved(len(entries)):
            log.info('index: exact search of %d vectors; pip install "twoview[faiss]" for a faster one', len(entries))
        engine = create(kind, self.dim, len(entries), self.settings)
        if engine is not None:
            log.info("index: building %s of %d vectors of %d dimensions", kind, len(entries), self.dim)
            engine.add(entries.vectors)
        self._entries, self._alive, self._engine, self.kind = entries, None, engine, kind
        self._share_vectors()
        self._reach_recall()

    def search(self, encoder: Encoder | str | None, query: Source, k: int = 10) -> Neighbors:
        """Find the k most similar entries of each query by cosine similarity.

        Images are preprocessed as those of the index were. Similarities are those of the stored vectors, also for
        "hnsw" and "ivfpq".

        Args:
            encoder: the network of the index; or the hash of its weights, for vectors.
            query: as ``source`` of :meth:`build`.
            k: number of entries, >= 1; all entries if there are fewer.

        Raises:
            UserError: if the encoder or the vectors are of another network.
        """
        require(isinstance(k, int) and k >= 1, f"k={k}: give a whole number, at least 1")
        queries = unit_vectors(self._of_this_network(encoder, query).vectors)
        similarity, rows = self._vectors.most_similar(queries, min(k, len(self)))
        texts = (
            [[text[i] for i in found] for found in rows.tolist()]
            for text in (self._entries.paths, self._entries.labels)
        )
        return Neighbors(similarity, self._entries.ids[rows], *texts)

    def _of_this_network(self, encoder: Encoder | str | None, source: Source) -> Embeddings:
        """Embeddings of the network of the index, with its preprocessing."""
        given = None if encoder is None else checkpoint_of(encoder)
        if given is not None:
            advice = "give that encoder, or build another index of this one"
            message = f"its weights have the hash {given}, those of the index {self.checkpoint}; {advice}"
            require(given == self.checkpoint, f"encoder: {message}")
        if isinstance(encoder, Encoder):
            encoder = with_preprocessing(encoder, self.card, "index")
        found = as_embeddings(encoder, source, given)
        theirs = found.metadata["checkpoint"]
        message = f"are of {theirs}, the index is of {self.checkpoint}; embed the images by the same encoder"
        require(theirs == self.checkpoint, f"vectors: {message}")
        require_same_preprocessing(found, self.card)
        dim = found.vectors.shape[1]
        require(dim == self.dim, f"vectors: have {dim} dimensions, those of the index {self.dim}; embed them again")
        return found

    def _new_entries(self, found: Embeddings, ids: Sequence[int] | Tensor | None) -> Entries:
        """Entries of embeddings, whose ids are not in the index."""
        count = len(found.vectors)
        if ids is None:
            numbers = torch.arange(self._next_id, self._next_id + count)
        else:
            numbers = torch.as_tensor(ids, dtype=torch.int64)
            require(numbers.shape == (count,), f"ids: there are {len(numbers)} for {count} vectors; give one for each")
            require(not count or 0 <= int(numbers.min()) <= int(numbers.max()) < 2**62, "ids: give numbers from 0")
            twice = numbers[torch.isin(numbers, self.ids)].tolist()
            require(not twice, f"ids: {twice[:3]} are in the index already; remove them first")
            require(len(numbers.unique()) == count, "ids: a number is given twice; give different ones")
        self._next_id = max(self._next_id, int(numbers.max()) + 1) if count else self._next_id
        vectors = unit_vectors(found.vectors, self.settings.half)
        labels = ["" if label is None else str(label) for label in found.labels]
        return Entries(vectors, numbers, Texts.of(found.paths), Texts.of(labels))

    def _rows_of(self, which: list[Any]) -> Tensor:
        """Entries of ids or paths, boolean ``[N]``."""
        paths = bool(which) and all(isinstance(item, str) for item in which)
        if paths:
            wanted = set(which)
            rows = torch.tensor([path in wanted for path in self._entries.paths], dtype=torch.bool)
        else:
            require(all(isinstance(item, int) for item in which), "remove: give ids, or paths")
            rows = torch.isin(self._entries.ids, torch.tensor(which, dtype=torch.int64))
        rows = rows if self._alive is None else rows & self._alive
        present = (
            {self._entries.paths[i] for i in rows.nonzero().flatten().tolist()}
            if paths
            else set(self._entries.ids[rows].tolist())
        )
        missing = [item for item in which if item not in present]
        require(not missing, f"remove: there is no entry {missing[:3]}; leave it out")
        return rows

    @property
    def _vectors(self) -> Vectors:
        return Vectors(self._entries.vectors, self._alive, self._engine)

    def _reach_recall(self) -> None:
        self.recall, self._measured = self._vectors.reach_recall(self.settings.recall), True

    def _share_vectors(self) -> None:
        """Take the vectors that a graph holds, instead of holding them twice."""
        if isinstance(self._engine, Hnsw):
            entries = self._entries
            self._entries = Entries(self._engine.vectors(), entries.ids, entries.paths, entries.labels)
