"""Images in Parquet files, as on the Hugging Face hub."""

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from twoview.data.disk_cache import files_fingerprint
from twoview.data.image_data import ImageData
from twoview.data.images import WINDOW
from twoview.data.splits import LoadSettings, Places, Split, find_shards, load_splits
from twoview.devices import available_memory, require_memory
from twoview.errors import UserError, require

CACHE_BYTES = 2**28  # largest size in bytes of the row groups that each process caches
GROUP_BYTES = 2e9  # largest size in bytes of the images of a row group, or a quarter of the free memory if that is less
READ_ROWS = 1024  # largest number of rows that are decoded at a time
ROW_BYTES = 64  # size in bytes of the name, the label and the positions that a run holds for each row


class ParquetImages(Sequence[bytes]):
    """Encoded images in a column of Parquet files; row groups are read as a whole, and the last ones used are cached.

    Args:
        files: Parquet files with the same columns.
        column: name of the column of images, which is binary or, as on the Hugging Face hub, a struct with a field
            ``bytes``.
        groups: for each row group, the index of its file in ``files`` and the index of the row group in that file.
        starts: int64, position of the first image of each row group, followed by the total number of images.
        read_paths: whether strings are paths of image files to open, relative to the folder of the Parquet file.
        limit: largest size in bytes of the images of a row group; larger row groups are not read.
    """

    def __init__(
        self,
        files: list[str],
        column: str,
        groups: list[tuple[int, int]],
        starts: np.ndarray,
        read_paths: bool = False,
        limit: float = GROUP_BYTES,
    ) -> None:
        self.files, self.column, self.groups, self.starts, self.read_paths = files, column, groups, starts, read_paths
        self.limit = limit
        self.cached: OrderedDict[int, Any] = OrderedDict()
        self.too_large: set[int] = set()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        group = bisect_right(self.starts, position) - 1
        if group in self.cached:
            self.cached.move_to_end(group)
        else:
            self.cached[group] = self._read(group)
            # Training draws from WINDOW groups at a time.
            while len(self.cached) > WINDOW or (len(self.cached) > 1 and self._bytes() > CACHE_BYTES):
                self.cached.popitem(last=False)
        encoded = self.cached[group][position - int(self.starts[group])].as_py()
        if isinstance(encoded, str) and self.read_paths:
            return os.path.join(os.path.dirname(self.files[self.groups[group][0]]), encoded)
        if not isinstance(encoded, bytes):
            raise ValueError("this row has no bytes")
        return encoded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached": OrderedDict()}

    def name(self, position: int) -> str:
        """Return the file and row of the image at a position, for messages."""
        group = bisect_right(self.starts, position) - 1
        file, number = self.groups[group]
        return f"{self.files[file]}, row {position - int(self.starts[group])} of row group {number}"

    def fingerprint(self) -> str | None:
        """Hash of the paths, sizes and times of modification of the files, and of the column; None with read_paths."""
        return None if self.read_paths else files_fingerprint(self.files, self.column.encode())

    def _bytes(self) -> int:
        return sum(column.nbytes for column in self.cached.values())

    def _read(self, group: int) -> Any:
        import pyarrow.compute
        import pyarrow.parquet

        (file, number), parts, size = self.groups[group], [], 0
        message = f"the images of this row group take more than {self.limit / 1e9:.1f} GB"
        if group not in self.too_large:
            with pyarrow.parquet.ParquetFile(self.files[file]) as handle:
                for part in read_parts(handle, self.column, number, self.limit):
                    parts.append(part)
                    size += part.nbytes
                    if size > self.limit:
                        self.too_large.add(group)  # or the group would be decoded again for each of its rows
                        break
        if group in self.too_large:
            raise ValueError(f"{message}; write the file with smaller row groups")
        column = pyarrow.chunked_array(parts)
        return pyarrow.compute.struct_field(column, "bytes") if pyarrow.types.is_struct(column.type) else column


def read_parts(handle: Any, column: str, group: int, limit: float) -> Iterator[Any]:
    """Decode a column of a row group of a ``pyarrow.parquet.ParquetFile`` some rows at a time.

    A value or a prefix of values that many rows share is stored once and decoded for each of them, so the size of a
    whole row group is not known before it is decoded. The rows at a time take at most a quarter of ``limit`` bytes,
    since no value is larger than what is stored.
    """
    rows = int(limit / 4 // max(1, _stored_bytes(handle, column, group)))
    rows = max(1, min(READ_ROWS, rows))
    # Single-threaded: pyarrow's thread pool does not survive the fork of a loader process.
    for batch in handle.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
        yield batch.column(0)


def _stored_bytes(handle: Any, column: str, group: int) -> int:
    """Size of a column of a row group as it is stored, before compression."""
    chunks = handle.metadata.row_group(group)
    paths = [handle.schema.column(i).path for i in range(chunks.num_columns)]
    own = [i for i, path in enumerate(paths) if path == column or path.startswith(f"{column}.")]
    return sum(int(chunks.column(i).total_uncompressed_size) for i in own)


def parquet(
    root: Places,
    eval_root: Places | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    read_paths: bool = False,
    **options: Any,
) -> ImageData:
    """Load images from Parquet files, as on the Hugging Face hub.

    Images that do not fit in memory are read by row group. Each epoch shuffles the row groups, then shuffles the images
    of every 32 row groups together. With several ranks, each rank reads its own share of the row groups.

    Args:
        root: a file, a folder with the ``.parquet`` files of one split, a glob pattern such as
            ``data/train-*.parquet``, or a list of these.
        eval_root: labeled test images, in the same forms as ``root``. None holds out a fifth of the labeled images.
        image_column: name of the column of images; None selects "image" or "img".
        label_column: name of the column of labels; None selects "label", "labels" or "fine_label" if one of these
            exists.
        read_paths: whether strings in the image column are paths of files to open. Without it they are refused, since a
            table from elsewhere could name any file.
        options: fields of :class:`twoview.data.splits.LoadSettings`.

    Raises:
        UserError: if there are no images, a column is missing, too many images are unreadable, or pyarrow is missing.
    """
    find = partial(_read_index, image_column=image_column, label_column=label_column, read_paths=read_paths)
    return load_splits(find, root, eval_root, "parquet", LoadSettings(**options))


def _read_index(root: Places, knob: str, image_column: str | None, label_column: str | None, read_paths: bool) -> Split:
    files = find_shards(root, knob, (".parquet",))
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError('data=parquet needs: pip install "twoview[parquet]"') from None
    limit = min(GROUP_BYTES, available_memory(torch.device("cpu")) / 4)
    groups, sizes, names = [], [0], []
    columns: tuple[str, str | None] = ("", None)  # columns of the first file
    for number, file in enumerate(files):
        try:
            with pyarrow.parquet.ParquetFile(file) as handle:
                schema = handle.schema_arrow
                columns = columns if number else _columns(schema, knob, image_column, label_column)
                strings = str(schema.field(columns[0]).type) in ("string", "large_string", "string_view")
                advice = "holds strings; set data.read_paths=true if they are paths of image files that may be opened"
                require(read_paths or not strings, f"data.image_column={columns[0]}: {advice}")
                groups += [(number, group) for group in range(handle.num_row_groups)]
                sizes += [handle.metadata.row_group(group).num_rows for group in range(handle.num_row_groups)]
                check_sizes(handle, columns[0], sum(sizes), limit, f"{knob}: {file}")
                names += _label_names(handle, columns[1], limit) if columns[1] else []
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise UserError(f"{knob}: {file} cannot be read as Parquet ({error}); repair or remove it") from error
    require(sum(sizes), f"{knob}: there are no rows in {', '.join(files[:3])}")
    images = ParquetImages(files, columns[0], groups, np.cumsum(sizes, dtype=np.int64), read_paths, limit)
    return Split(images, names or [None] * len(images))


def check_sizes(handle: Any, column: str, rows: int, limit: float, where: str) -> None:
    """Refuse more rows than can be listed in memory, and row groups that are stored with more than ``limit`` bytes."""
    require_memory(f"{where}: a list of {rows:,} images", ROW_BYTES * rows, "give other files")
    stored = max((_stored_bytes(handle, column, group) for group in range(handle.num_row_groups)), default=0)
    message = f"has a row group of {stored / 1e9:,.1f} GB, but at most {limit / 1e9:,.1f} GB are read at once"
    require(stored <= limit, f"{where}: {message}; write the file with smaller row groups")


def _columns(schema: Any, knob: str, image: str | None, label: str | None) -> tuple[str, str | None]:
    images = [name for name in ([image] if image else ["image", "img"]) if name in schema.names]
    labels = [name for name in ([label] if label else ["label", "labels", "fine_label"]) if name in schema.names]
    advice = f"the columns of {knob} are {', '.join(schema.names)}; name one"
    require(images, f"data.image_column={image}: {advice}")
    require(labels or not label, f"data.label_column={label}: {advice}")
    return images[0], labels[0] if labels else None


def _declared_names(schema: Any, column: str) -> list[str] | None:
    """Class names of a column that the metadata of the hub declare; None without such metadata or if they are odd."""
    try:
        hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = hub["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _label_names(handle: Any, name: str, limit: float) -> list[str | None]:
    """Return class names of the Hugging Face metadata, else the values as text; None for null and numbers < 0."""
    declared = _declared_names(handle.schema_arrow, name)
    found: list[str | None] = []
    names: dict[Any, str | None] = {}  # so that equal values share one string
    for group in range(handle.num_row_groups):
        for part in read_parts(handle, name, group, limit):
            values = part.to_pylist()
            try:
                for value in set(values) - names.keys():
                    unknown = value is None or (isinstance(value, int) and value < 0)
                    names[value] = None if unknown else declared[value] if declared else str(value)
            except (TypeError, IndexError) as error:
                message = f"holds no class numbers or names ({error}); name another"
                raise UserError(f"data.label_column={name}: {message}") from error
            found += [names[value] for value in values]
    return found
