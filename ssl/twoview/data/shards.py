"""Pictures packed into files: Parquet as on the Hugging Face hub, and WebDataset tar shards; read in place."""

import glob
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twoview.data.decode import SUFFIXES
from twoview.data.images import WINDOW, ImageData
from twoview.data.pictures import Split, load_splits
from twoview.errors import UserError

KEPT_BYTES = 2**28  # of row groups, in every process


class TarPictures(Sequence[bytes]):
    """The encoded pictures of uncompressed tar files, each read from where it lies.

    Args:
        files: the shards.
        where: int64 ``[N, 3]``: number of the shard, first byte, number of bytes.
    """

    starts = None  # any order is as good as any other

    def __init__(self, files: Sequence[str], where: np.ndarray) -> None:
        self.files, self.where = list(files), where

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, position: Any) -> Any:
        shard, first, size = (int(number) for number in self.where[position])
        # Opened anew each time: an open file would share its position with forked workers and not survive spawning.
        with open(self.files[shard], "rb") as handle:
            handle.seek(first)
            return handle.read(size)

    def name(self, position: int) -> str:
        """For messages."""
        return f"{self.files[int(self.where[position][0])]}, byte {int(self.where[position][1])}"


class ParquetPictures(Sequence[bytes]):
    """The encoded pictures in one column of Parquet files, whose row groups are read whole and kept for a while.

    Args:
        files: Parquet files with the same columns.
        column: of the pictures: binary, or a struct with a field ``bytes`` as on the Hugging Face hub.
        groups: for each row group the number of its file and its number in it.
        starts: position of the first picture of each row group, and the number of all pictures last.
    """

    def __init__(
        self, files: Sequence[str], column: str, groups: Sequence[tuple[int, int]], starts: np.ndarray
    ) -> None:
        self.files, self.column, self.groups, self.starts = list(files), column, list(groups), starts
        self.kept: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        group = bisect_right(self.starts, position) - 1
        if group in self.kept:
            self.kept.move_to_end(group)
        else:
            self.kept[group] = self._read(group)
            # No more than training draws from at a time, and no more than a worker should hold.
            while len(self.kept) > WINDOW or (len(self.kept) > 1 and self._bytes() > KEPT_BYTES):
                self.kept.popitem(last=False)
        encoded = self.kept[group][position - int(self.starts[group])].as_py()
        if encoded is None:
            raise ValueError("there are no bytes in this row")
        return encoded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": OrderedDict()}

    def name(self, position: int) -> str:
        """For messages."""
        group = bisect_right(self.starts, position) - 1
        file, number = self.groups[group]
        return f"{self.files[file]}, row {position - int(self.starts[group])} of row group {number}"

    def _bytes(self) -> int:
        return sum(column.nbytes for column in self.kept.values())

    def _read(self, group: int) -> Any:
        import pyarrow.compute
        import pyarrow.parquet

        file, number = self.groups[group]
        # One thread: pyarrow's pool does not survive the fork of a loader process.
        with pyarrow.parquet.ParquetFile(self.files[file]) as handle:
            column = handle.read_row_group(number, columns=[self.column], use_threads=False)[self.column]
        column = column.combine_chunks()
        return pyarrow.compute.struct_field(column, "bytes") if pyarrow.types.is_struct(column.type) else column


def parquet(
    root: str | Sequence[str],
    eval_root: str | Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    **options: Any,
) -> ImageData:
    """Pictures in Parquet files, as the Hugging Face hub keeps them.

    What does not fit in memory is read by row groups: each epoch shuffles these, then the pictures within a window of
    32 of them; under many ranks each rank reads its own share.

    Args:
        root: a file, a folder with ``.parquet`` files of one split, a pattern such as ``data/train-*.parquet``, or
            several.
        eval_root: the same for labelled test pictures.
        image_column: None for "image" or "img".
        label_column: None for "label", "labels" or "fine_label", if there is one.
        options: as for :func:`twoview.data.folder`.

    Raises:
        UserError: nothing there, a column missing, or too much of it broken.
    """
    return load_splits(
        lambda given, knob: _parquet_split(_shards(given, knob, (".parquet",)), knob, image_column, label_column),
        root,
        eval_root,
        "parquet",
        **options,
    )


def webdataset(root: str | Sequence[str], eval_root: str | Sequence[str] | None = None, **options: Any) -> ImageData:
    """Pictures in WebDataset tar shards on local disks.

    The shards are gone through once, by their headers, and pictures read from where they lie: the order is as random as
    that of single files. A sample's label is its ``.cls`` file, or "label" or "cls" in its ``.json``, if there is one.

    Args:
        root: a file, a folder with ``.tar`` files of one split, a pattern such as ``shards/train-*.tar``, or several.
        eval_root: the same for labelled test pictures.
        options: as for :func:`twoview.data.folder`.

    Raises:
        UserError: nothing there, compressed shards, or too much of it broken.
    """
    return load_splits(
        lambda given, knob: _tar_split(_shards(given, knob, (".tar", ".tgz", ".tar.gz")), knob),
        root,
        eval_root,
        "webdataset",
        **options,
    )


def _shards(roots: str | Sequence[str], knob: str, suffixes: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for root in roots if isinstance(roots, list | tuple) else [roots]:
        where = os.path.expanduser(str(root))
        if "://" in where or where.startswith("pipe:"):
            raise UserError(f"{knob}={root}: shards are read from local disks; copy them to one first")
        if os.path.isdir(where):
            files = sorted(str(path) for path in Path(where).rglob("*") if path.name.endswith(suffixes))
            # On the hub, splits are beginnings of names or folders.
            parts = {part for file in files for part in Path(file).relative_to(where).parts}
            splits = {match[0] for part in parts if (match := re.match(r"train|test|valid|val", part))}
            if len(splits) > 1:
                raise UserError(
                    f"{knob}={root}: this folder holds several splits ({', '.join(sorted(splits))}); give a pattern "
                    f"for one of them, such as {knob}={Path(where) / f'train*{suffixes[0]}'}"
                )
        else:
            files = [where] if os.path.isfile(where) else sorted(glob.glob(where, recursive=True))
        if not files:
            raise UserError(f"{knob}={root}: no {suffixes[0]} file there; give a file, a folder or a pattern with *")
        found += files
    return found


def _parquet_split(files: list[str], knob: str, image_column: str | None, label_column: str | None) -> Split:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError('data=parquet needs: pip install "twoview[parquet]"') from None
    groups, sizes, names = [], [0], []
    columns: tuple[str, str | None] | None = None
    for number, file in enumerate(files):
        try:
            with pyarrow.parquet.ParquetFile(file) as handle:
                schema = handle.schema_arrow
                columns = columns or _columns(schema, knob, image_column, label_column)
                for group in range(handle.num_row_groups):
                    groups.append((number, group))
                    sizes.append(handle.metadata.row_group(group).num_rows)
                names += _label_names(handle.read([columns[1]])[columns[1]], schema, columns[1]) if columns[1] else []
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise UserError(f"{knob}: {file} cannot be read as Parquet ({error}); mend or remove it") from error
    if columns is None or sum(sizes) == 0:
        raise UserError(f"{knob}: there are no rows in {', '.join(files[:3])}")
    pictures = ParquetPictures(files, columns[0], groups, np.cumsum(sizes, dtype=np.int64))
    return Split(pictures, names or [None] * len(pictures))


def _columns(schema: Any, knob: str, image: str | None, label: str | None) -> tuple[str, str | None]:
    found = []
    for asked, usual, which in (
        (image, ("image", "img"), "image_column"),
        (label, ("label", "labels", "fine_label"), "label_column"),
    ):
        have = [name for name in ([asked] if asked else usual) if name in schema.names]
        if not have and (asked or which == "image_column"):
            raise UserError(f"data.{which}={asked}: the columns of {knob} are {', '.join(schema.names)}; name one")
        found.append(have[0] if have else None)
    return found[0] or "", found[1]


def _label_names(column: Any, schema: Any, name: str) -> list[str | None]:
    """Class names as the hub declares them, or what is in the column; None for null and negative numbers."""
    hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = hub.get("info", {}).get("features", {}).get(name)
    declared = feature.get("names") if isinstance(feature, dict) else None
    values = column.to_pylist()
    names: dict[Any, str | None] = {}
    try:
        for value in set(values):
            unknown = value is None or (isinstance(value, int) and value < 0)
            names[value] = None if unknown else declared[value] if declared else str(value)
    except (TypeError, IndexError) as error:
        raise UserError(f"data.label_column={name}: holds no class numbers or names ({error}); name another") from error
    return [names[value] for value in values]


def _tar_split(files: list[str], knob: str) -> Split:
    where, names = [], []
    for number, file in enumerate(files):
        try:
            with tarfile.open(file, "r:") as shard:
                for picture, name in _samples(shard):
                    where.append((number, picture.offset_data, picture.size))
                    names.append(name)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(
                f"{knob}: {file} cannot be read as an uncompressed tar file ({error}); unpack, mend or remove it"
            ) from error
    if not where:
        raise UserError(f"{knob}: there are no pictures in {', '.join(files[:3])}")
    return Split(TarPictures(files, np.array(where, dtype=np.int64)), names)


def _samples(shard: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """Pictures with their labels; files of one sample share their name up to the first dot and lie side by side."""
    key, picture, label = None, None, None
    for member in shard:
        if not member.isfile():
            continue
        folder, name = os.path.split(member.name)
        stem, _, extension = name.partition(".")
        if (folder, stem) != key:
            if picture is not None:
                yield picture, label
            key, picture, label = (folder, stem), None, None
        if f".{extension.lower()}" in SUFFIXES:
            picture = picture or member
        elif extension in ("cls", "json"):
            content = shard.extractfile(member)
            text = content.read().decode("utf-8", "replace").strip() if content else ""
            label = (text if text not in ("", "-1") else None) if extension == "cls" else label or _json_label(text)
    if picture is not None:
        yield picture, label


def _json_label(text: str) -> str | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    found = [content[key] for key in ("label", "cls") if key in content] if isinstance(content, dict) else []
    return str(found[0]) if found and found[0] is not None else None
