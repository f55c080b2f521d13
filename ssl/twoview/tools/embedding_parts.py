"""The folder of finished parts beside a file of embeddings, so that a killed run loses at most one part a process."""

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twoview.errors import UserError, require
from twoview.files import LOCK, open_regular, read_json, write_atomically
from twoview.tools.embedding_file import encoded

log = logging.getLogger(__name__)

PART = 4096  # largest number of images of a part, and of rows of a row group
PART_FACTS = b"twoview.part"  # metadata of a part: its images, and those that are unreadable
PLAN_FILE = "plan.json"
COMPRESSION = {"path": "zstd", "label": "zstd"}  # vectors and JPEG files do not shrink
ADVICE = "run the same command again, which computes only what is missing"


@dataclass(frozen=True)
class Plan:
    """What the content of a file of embeddings depends on.

    Args:
        checkpoint: hash of the weights.
        preprocessing: sizes, mean and standard deviation of the preprocessing.
        precision: "fp32" or "fp16".
        columns: names of the additional columns.
        batch_size: number of images of a forward pass, on which the last digits of features depend.
        images: number of images, the unreadable ones included.
        data: hash of the paths, sizes, times of modification and labels of all images.
    """

    checkpoint: str
    preprocessing: Mapping[str, Any]
    precision: str
    columns: Sequence[str]
    batch_size: int
    images: int
    data: str

    @property
    def plain(self) -> dict[str, Any]:
        """The fields as they are after encoding as JSON and decoding."""
        found: dict[str, Any] = json.loads(encoded(asdict(self)))
        return found

    @property
    def name(self) -> str:
        """Hash of all fields, with which the names of parts begin."""
        return hashlib.blake2b(encoded(self.plain), digest_size=6).hexdigest()

    def differences(self, stored: Mapping[str, Any], knobs: Sequence[str] | None = None) -> list[str]:
        """What differs from a stored plan, such as "precision was fp32, is fp16", in a few words each.

        Args:
            stored: fields of the other plan.
            knobs: names of the fields that are compared; None for all.
        """
        pairs = [(k, stored.get(k), v) for k, v in self.plain.items() if knobs is None or k in knobs]
        found = {k: f"{k} was {was}, is {now}" for k, was, now in pairs if was != now}
        if "data" in found:
            found["data"] = "images were added, removed or changed"
        return [text if len(text) < 120 else f"another {k}" for k, text in found.items()]


class Parts:
    """Finished parts of a file of embeddings, each of which holds the rows of up to 4,096 consecutive images.

    Args:
        folder: folder of the parts.
        plan: what the parts depend on.
        schema: ``pyarrow.Schema`` of the parts.
    """

    def __init__(self, folder: Path, plan: Plan, schema: Any) -> None:
        self.folder, self.plan, self.schema = folder, plan, schema

    def __len__(self) -> int:
        return math.ceil(self.plan.images / PART)

    def positions(self, number: int) -> range:
        """Positions of the images of a part."""
        return range(number * PART, min((number + 1) * PART, self.plan.images))

    def file(self, number: int) -> Path:
        """Path of a part."""
        return self.folder / f"{self.plan.name}-{number:06d}.parquet"

    def stored_plan(self) -> dict[str, Any] | None:
        """Return the plan of the parts that are in the folder; None if there are none."""
        try:
            return read_json(self.folder / PLAN_FILE)
        except (OSError, ValueError):
            return None

    def begin(self) -> None:
        """Store the plan. Parts of another plan stay, as rows of unchanged images may be taken from them."""
        if self.stored_plan() != self.plan.plain:
            write_atomically(self.folder / PLAN_FILE, encoded(self.plan.plain))

    def earlier(self) -> list[Path]:
        """Parts of other plans, in the order of their names."""
        return [file for file in self._own_files() if not file.name.startswith(self.plan.name)]

    def write(self, number: int, table: Any, broken: Sequence[tuple[int, str, str]]) -> None:
        """Write a part atomically.

        Args:
            number: number of the part.
            table: ``pyarrow.Table`` of its rows.
            broken: position, path and reason of each unreadable image among :meth:`positions`.
        """
        facts = {PART_FACTS: encoded({"part": number, "broken": list(broken)})}
        write_table(self.file(number), self.schema.with_metadata((self.schema.metadata or {}) | facts), [table])

    def read(self, number: int) -> tuple[Any, list[tuple[int, str, str]]]:
        """Read and check a part.

        Returns:
            Its rows as ``pyarrow.Table``; and position, path and reason of each unreadable image.

        Raises:
            UserError: if it is damaged, which its checksums tell.
        """
        import pyarrow as pa
        import pyarrow.parquet

        file = self.file(number)
        try:
            with (
                open_regular(file) as handle,
                pyarrow.parquet.ParquetFile(handle, page_checksum_verification=True) as found,
            ):
                facts = json.loads((found.schema_arrow.metadata or {})[PART_FACTS])
                broken = [(int(position), str(path), str(why)) for position, path, why in facts["broken"]]
                if not found.schema_arrow.equals(self.schema) or facts["part"] != number:
                    raise ValueError("other columns or another part")
                table = found.read()
            rest = set(self.positions(number)) - {position for position, _, _ in broken}
            if table["index"].to_pylist() != sorted(rest):
                raise ValueError("other images")
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: this part is damaged ({error}); delete it, and {ADVICE}") from error
        return table, broken

    def is_complete(self, number: int) -> bool:
        """Whether a part is there; one that is damaged is reported and will be computed again."""
        if not self.file(number).exists():
            return False
        try:
            self.read(number)
        except UserError as error:
            log.warning("%s", error)
            return False
        return True

    def vectors(self) -> Iterator[np.ndarray]:
        """Yield the vectors of each part, fp32 ``[n, F]``, in the order of the images."""
        for number in range(len(self)):
            yield vectors_of(self.read(number)[0]["vector"]).astype(np.float32)

    def discard(self) -> None:
        """Remove all parts and their plan."""
        for file in [self.folder / PLAN_FILE, *self._own_files()]:
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder with everything that belongs to it; files of others stay, and the folder with them."""
        self.discard()
        (self.folder / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _own_files(self) -> list[Path]:
        return sorted(f for f in self.folder.glob("*.parquet") if re.fullmatch(r"[0-9a-f]{12}-\d{6}\.parquet", f.name))


def write_table(path: Path, schema: Any, tables: Iterator[Any] | Sequence[Any]) -> None:
    """Write tables to a Parquet file, each as one row group, by :func:`twoview.files.write_atomically`.

    Raises:
        UserError: if the folder cannot be written, or the disk is full.
    """
    import pyarrow.parquet

    # Pages have checksums, so that damage is noticed when a file is read.
    options: Any = {"compression": COMPRESSION, "use_dictionary": ["label"], "write_page_checksum": True}

    def content(file: Any) -> None:
        with pyarrow.parquet.ParquetWriter(file, schema, **options) as writer:
            for table in tables:
                writer.write_table(table.cast(schema), row_group_size=max(1, len(table)))

    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); free disk space, and {ADVICE}") from error


def vectors_of(column: Any) -> np.ndarray:
    """Return a column of vectors as array ``[n, F]`` of its own precision.

    Raises:
        ValueError: if one is missing.
    """
    if column.null_count:
        raise ValueError("a row without a vector")
    width = column.type.list_size
    combined = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return np.asarray(combined.flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)


def check_broken(parts: Parts, max_broken: float, broken: Sequence[tuple[int, str, str]]) -> None:
    """Raise :class:`UserError` if more than the share ``max_broken`` of all images, or all of them, are unreadable."""
    n, first = parts.plan.images, "; ".join(f"{path} ({reason})" for _, path, reason in broken[:3])
    message = f"{len(broken)} of {n} images cannot be read (first: {first})"
    advice = f"raise data.max_broken={max_broken:g}, and {ADVICE}; or repair them, and add update=true"
    require(len(broken) <= max_broken * n and len(broken) < n, f"{parts.folder}: {message}; {advice}")
