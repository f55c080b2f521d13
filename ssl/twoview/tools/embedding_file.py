"""Reading of the Parquet file of embeddings, one row an image."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twoview.devices import require_memory
from twoview.errors import UserError, require
from twoview.files import open_regular

MAX_DIM = 2**16  # largest number of dimensions
ROWS = 4096  # largest number of rows that are decoded at once
BATCH_BYTES = 2**28  # largest size in bytes of the texts and of the vectors that are decoded at once


class Embeddings(NamedTuple):
    """Embeddings of images, and the network that they are from.

    Attributes:
        paths: N paths of images.
        indices: int64 ``[N]``, positions of the images in their data set.
        labels: N labels, None where unknown.
        vectors: fp32 or fp16 ``[N, D]``.
        metadata: values by name: ``checkpoint`` (hash of the weights of the network), ``card`` (fields of its
            :class:`twoview.ModelCard`), ``preprocessing`` (its sizes, mean and standard deviation) and ``source`` (file
            or name that it was loaded from); those that are known. They are as a stranger may have written them.
    """

    paths: Sequence[str]
    indices: Tensor
    labels: Sequence[str | None]
    vectors: Tensor
    metadata: Mapping[str, Any]


def read_embeddings(path: str | Path) -> Embeddings:
    """Read a Parquet file of embeddings by row groups.

    It has the columns ``path`` (string), ``index`` (int64), ``label`` (string or int, null where unknown; may be
    missing) and ``vector`` (fixed_size_list of float or halffloat), and metadata such as ``twoview.checkpoint``.

    Args:
        path: the file.

    Raises:
        UserError: if the file cannot be read, has other columns, or does not fit in memory; or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError('a Parquet file of embeddings needs pyarrow: pip install "twoview[parquet]"') from None
    try:
        with open_regular(path) as file, pyarrow.parquet.ParquetFile(file) as table:
            return _read(table, str(path))
    except (OSError, KeyError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); write it again with task=embed") from error


def _read(table: Any, path: str) -> Embeddings:
    kind = _check_columns(table.schema_arrow, path)
    dim, half = kind.list_size, str(kind.value_type) == "halffloat"
    rows = table.metadata.num_rows
    require_memory(f"{path}: {rows:,} vectors", rows * (dim * (2 if half else 4) + 64), "split the file")
    vectors = torch.empty(rows, dim, dtype=torch.float16 if half else torch.float32)
    indices = torch.empty(rows, dtype=torch.int64)
    paths: list[str] = []
    labels: list[str | None] = []
    columns = [name for name in ("path", "index", "label", "vector") if name in table.schema_arrow.names]
    at_once = min(ROWS, max(1, BATCH_BYTES // (4 * dim)), _rows_of_texts(table))
    for group in range(table.num_row_groups):
        # Single-threaded: rows are decoded a few at a time, since equal texts are stored once.
        for batch in table.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
            start, end = len(paths), len(paths) + len(batch)
            vector = batch.column("vector")
            values = vector.flatten()
            full = not vector.null_count and not values.null_count and not batch.column("index").null_count
            full = full and not batch.column("path").null_count
            require(full, f"{path}: has rows without path, index or vector; write it again with task=embed")
            vectors[start:end] = torch.from_numpy(values.to_numpy().reshape(-1, dim).copy())
            indices[start:end] = torch.from_numpy(batch.column("index").to_numpy().copy())
            paths += batch.column("path").to_pylist()
            given = batch.column("label").to_pylist() if "label" in columns else [None] * len(batch)
            labels += [None if label is None else str(label) for label in given]
    return Embeddings(paths, indices, labels, vectors, _metadata(table.schema_arrow.metadata or {}))


def _check_columns(schema: Any, path: str) -> Any:
    """Refuse other columns; return the type of the vectors."""
    types = {field.name: field.type for field in schema}
    texts = ("string", "large_string")
    known = {"path": texts, "index": ("int64",), "label": (*texts, "int64", "int32", "int16", "int8", "null")}
    advice = "give a file of task=embed"
    for name, allowed in known.items():
        found = str(types.get(name, "missing"))
        fits = found in allowed or (name == "label" and found == "missing")
        require(fits, f"{path}: the column {name} is {found}, not {allowed[0]}; {advice}")
    kind = types.get("vector")
    size = getattr(kind, "list_size", 0)
    fits = str(getattr(kind, "value_type", "")) in ("float", "halffloat") and 1 <= size <= MAX_DIM
    require(fits, f"{path}: the column vector is {kind}, not a list of a fixed number of floats; {advice}")
    return kind


def _rows_of_texts(table: Any) -> int:
    """Rows whose texts fit in memory even if each is as large as all texts that its row group stores."""
    largest = 1
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        texts = [column.total_uncompressed_size for column in columns if column.path_in_schema in ("path", "label")]
        largest = max(largest, *texts)
    return int(max(1, BATCH_BYTES // largest))


def _metadata(found: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Metadata of the schema; values that cannot be decoded are left out."""
    values: dict[str, Any] = {}
    for name in ("checkpoint", "source", "card", "preprocessing"):
        with contextlib.suppress(KeyError, ValueError, RecursionError):
            text = found[f"twoview.{name}".encode()].decode()
            values[name] = text if name in ("checkpoint", "source") else json.loads(text)
    return values
