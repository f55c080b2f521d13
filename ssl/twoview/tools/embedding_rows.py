"""Rows of earlier files of embeddings, found by path, size and time of modification of the image."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from twoview.errors import UserError
from twoview.tools.embedding_file import CHECKPOINT, PREPROCESSING, open_embeddings
from twoview.tools.embedding_parts import vectors_of
from twoview.tools.embedding_source import KEY_BYTES, key

log = logging.getLogger(__name__)


class _Group(NamedTuple):
    file: Path
    number: int


class KnownRows:
    """Rows of embeddings that need not be computed again. They stay in their files; about 30 bytes a row are in memory.

    Args:
        files: files of embeddings, and parts of such files. Those with other metadata or columns than asked for are
            ignored.
        schema: ``pyarrow.Schema`` with the columns and the metadata that a file must have.
    """

    def __init__(self, files: Sequence[Path], schema: Any) -> None:
        self.columns = [name for name in ("height", "width", "vector", "thumbnail") if name in schema.names]
        self.groups: list[_Group] = []
        starts, keys = [0], list[bytes]()
        for file in files:
            try:
                found = _keys(file, schema)
            except UserError as error:
                log.warning("no rows are taken over: %s", error)
                continue
            for number, group in enumerate(found):
                keys += group
                self.groups.append(_Group(file, number))
                starts.append(len(keys))
        unsorted = np.array(keys, dtype=f"S{KEY_BYTES}")
        self.starts, self.order = np.array(starts), np.argsort(unsorted, kind="stable")
        self.sorted = unsorted[self.order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key of :meth:`twoview.tools.embedding_source.Source.keys`, -1 where there is none."""
        if not len(self.sorted):
            return np.full(len(keys), -1)
        places = np.searchsorted(self.sorted, keys).clip(max=len(self.sorted) - 1)
        return np.where(self.sorted[places] == keys, self.order[places], -1)

    def take(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Read rows, which need not be in order.

        Yields:
            Places in ``rows``; and for these the columns by name: ``sizes`` int ``[n, 2]``, ``vector`` ``[n, F]`` and
            ``thumbnail``, a list of bytes.
        """
        group_of = np.searchsorted(self.starts, rows, side="right") - 1
        for group in np.unique(group_of):
            places = np.nonzero(group_of == group)[0]
            file, number = self.groups[group]
            within = rows[places] - self.starts[group]
            with open_embeddings(file, "to") as handle:
                table = handle.read_row_group(number, columns=self.columns)
            sizes = np.stack([table[name].to_numpy() for name in ("height", "width")], 1)[within]
            thumbnails = table["thumbnail"].take(within).to_pylist() if "thumbnail" in self.columns else []
            yield places, {"sizes": sizes, "vector": vectors_of(table["vector"])[within], "thumbnail": thumbnails}


def _keys(file: Path, schema: Any) -> list[list[bytes]]:
    """Key of each row of each row group; an empty one, which no image has, for images that are in no file."""
    with open_embeddings(file, "to") as handle:
        names = ["path", "bytes", "modified", "height", "width"]
        groups = range(handle.num_row_groups) if _fits(handle.schema_arrow, schema) else []
        tables = (handle.read_row_group(number, columns=names).select(names).to_pydict() for number in groups)
        rows = (zip(*table.values(), strict=True) for table in tables)
        return [[b"" if None in row else key(row[0], row[1:3]) for row in group] for group in rows]


def _fits(found: Any, wanted: Any) -> bool:
    """Whether a file has the metadata and the columns that are wanted."""
    metadata = found.metadata or {}
    same = all(metadata.get(name) == wanted.metadata[name] for name in (CHECKPOINT, PREPROCESSING))
    return same and all(found.get_field_index(x.name) >= 0 and found.field(x.name).type == x.type for x in wanted)
