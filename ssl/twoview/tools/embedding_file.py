"""The Parquet file of embeddings: its columns and metadata, and checked reading.

A file has one row for each image, with these columns:

=========  ===========================  ================================================================================
path       string                       absolute path of the image file, or the name of an image that is in no file
index      int64                        position of the image in the data set, in which unreadable images count too
label      string                       name of the class; null if unknown
height     int32                        original height in pixels, upright
width      int32                        original width in pixels, upright
bytes      int64                        size of the image file; null for an image that is not in a file of its own
modified   int64                        time of modification of this file in nanoseconds since 1970, or null
vector     fixed_size_list<float>[F]    features; ``halffloat`` for ``precision=fp16``
thumbnail  binary                       JPEG file; only with ``columns=[thumbnail]``
x, y       float                        coordinates of a map; only with ``columns=[xy]``
neighbors  struct<ids, distances>       nearest rows; only with ``columns=[neighbors]``
=========  ===========================  ================================================================================
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twoview.data.folder import Paths
from twoview.data.parquet import GROUP_BYTES, check_sizes, read_parts
from twoview.devices import available_memory
from twoview.errors import UserError, require
from twoview.files import open_regular

CHECKPOINT, CARD, PREPROCESSING = b"twoview.checkpoint", b"twoview.card", b"twoview.preprocessing"
VERSION, PLAN, BROKEN, MAP = b"twoview.version", b"twoview.plan", b"twoview.broken", b"twoview.map"
SOURCE = b"twoview.source"
TEXTS = (CHECKPOINT, SOURCE, VERSION, MAP)  # the other values are JSON
PRECISIONS = {"fp32": "float", "fp16": "halffloat"}  # names of the types in Arrow
MAX_WIDTH = 2**17  # largest number of features that is read, also by an index
MAX_TEXT = 2**15  # largest size of a path or a label in bytes


class Embeddings(NamedTuple):
    """Content of a file of embeddings; N rows.

    Attributes:
        paths: path or name of each image.
        indices: int64 ``[N]``, position of each image in its data set.
        labels: class name of each image, None where unknown.
        vectors: fp32 ``[N, F]`` on the CPU, finite, in memory or read-only in a file that is mapped into memory.
        metadata: values by name: ``checkpoint`` (hash of the weights), ``source`` (file or name that the network was
            loaded from), ``card`` (fields of a :class:`twoview.ModelCard`), ``preprocessing``, ``version`` (of
            twoview), ``plan`` (settings), ``broken`` and ``map``; those that the file has. They are as a stranger may
            have written them.
    """

    paths: Sequence[str]
    indices: Tensor
    labels: list[str | None]
    vectors: Tensor
    metadata: Mapping[str, Any]


def require_pyarrow(path: str | Path, knob: str) -> None:
    """Raise :class:`UserError`, which names the file and its knob, if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f'{knob}={path}: needs pyarrow; pip install "twoview[parquet]"') from None


def schema(width: int, precision: str, thumbnails: bool, metadata: Mapping[bytes, bytes]) -> Any:
    """Return the ``pyarrow.Schema`` of the columns that depend on one image each.

    Args:
        width: number F of features.
        precision: "fp32" or "fp16".
        thumbnails: whether there is a column of thumbnails.
        metadata: metadata of the schema.
    """
    import pyarrow as pa

    numbers = [("height", pa.int32()), ("width", pa.int32()), ("bytes", pa.int64()), ("modified", pa.int64())]
    value = pa.float32() if precision == "fp32" else pa.float16()
    columns = [("path", pa.string()), ("index", pa.int64()), ("label", pa.string()), *numbers]
    columns += [("vector", pa.list_(value, width)), *([("thumbnail", pa.binary())] if thumbnails else [])]
    return pa.schema(columns, dict(metadata))


def read_embeddings(
    path: str | Path, memory: float | str | None = None, folder: str | None = None, knob: str = "index"
) -> Embeddings:
    """Read a file that :func:`twoview.tools.embed` has written. Nothing that the file claims is relied on unchecked.

    Args:
        path: path of the file.
        memory: largest size of vectors that are held in memory, in bytes or as "500MB" or "2GB"; None for a quarter of
            the free memory. Larger ones are copied to a temporary file, which is mapped into memory.
        folder: folder of the temporary file; None for the system's temporary folder.
        knob: name of the knob that names the file, for messages.

    Raises:
        UserError: if the file cannot be read, is no file of embeddings, or holds values that are missing or not
            finite; or pyarrow is missing.

    Example:
        >>> from twoview import load
        >>> from twoview.data import digits
        >>> from twoview.tools import embed
        >>> encoder = load("random:test_resnet", image_size=16, channels=1)
        >>> found = read_embeddings(embed(encoder, digits(image_size=16), f"{folder}/digits.parquet").path)
        >>> found.paths[0], found.vectors.shape
        ('pretrain image 0', torch.Size([1797, 96]))
    """
    from twoview.evaluation.feature_store import collect_features

    with open_embeddings(path, knob) as handle:
        rows, width = handle.metadata.num_rows, handle.schema_arrow.field("vector").type.list_size
        vectors = collect_features(lambda: vector_blocks(handle, f"{knob}={path}"), (rows, width), memory, folder)
        paths, indices, labels = (_values(handle, column, f"{knob}={path}") for column in ("path", "index", "label"))
    message = "has rows without a path or an index; write it again by task=embed"
    require(None not in paths and None not in indices, f"{knob}={path}: {message}")
    return Embeddings(Paths(paths), torch.tensor(indices).long(), labels, vectors, metadata(handle.schema_arrow))


@contextlib.contextmanager
def open_embeddings(path: str | Path, knob: str) -> Iterator[Any]:
    """Open a file of embeddings as ``pyarrow.parquet.ParquetFile`` and check its columns and the sizes that it states.

    Raises:
        UserError: if it is no file of embeddings, also if this is noticed while the file is open.
    """
    require_pyarrow(path, knob)
    import pyarrow as pa
    import pyarrow.parquet

    advice = "give a file that task=embed has written"
    try:
        with (
            open_regular(Path(path).expanduser()) as file,
            pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as handle,
        ):
            _check_columns(handle.schema_arrow, f"{knob}={path}", advice)
            for column in handle.schema_arrow.names:
                check_sizes(handle, column, handle.metadata.num_rows, _limit(), f"{knob}={path}")
            yield handle
    except UserError:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{knob}={path}: cannot be read as Parquet ({error}); {advice}") from error


def vector_blocks(handle: Any, where: str) -> Iterator[Tensor]:
    """Yield the vectors of an open file in their order, fp32 ``[n, F]`` each, with n up to 1,024.

    Args:
        handle: result of :func:`open_embeddings`.
        where: knob and path, for messages.

    Raises:
        UserError: if a vector is missing or not finite.
    """
    width = handle.schema_arrow.field("vector").type.list_size
    for group in range(handle.num_row_groups):
        for part in read_parts(handle, "vector", group, _limit()):
            require(not part.null_count, f"{where}: has rows without a vector; write it again by task=embed")
            values = torch.from_numpy(part.flatten().to_numpy(zero_copy_only=False).copy()).float().view(-1, width)
            require(bool(values.isfinite().all()), f"{where}: has vectors that are not finite; write it again")
            yield values


def metadata(found: Any) -> dict[str, Any]:
    """Return the metadata of a ``pyarrow.Schema`` by name; values that cannot be decoded are left out."""
    values: dict[str, Any] = {}
    for name in (CHECKPOINT, SOURCE, CARD, PREPROCESSING, VERSION, PLAN, BROKEN, MAP):
        with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
            text = found.metadata[name].decode(errors="surrogateescape" if name == SOURCE else "strict")
            values[name.decode().removeprefix("twoview.")] = text if name in TEXTS else json.loads(text)
    return values


def encoded(values: Mapping[str, Any]) -> bytes:
    """Encode plain values as JSON for the metadata, in the same way whatever their order."""
    return json.dumps(values, sort_keys=True, ensure_ascii=False).encode(errors="backslashreplace")


def _limit() -> float:
    return min(GROUP_BYTES, available_memory(torch.device("cpu")) / 4)


def _check_columns(found: Any, where: str, advice: str) -> None:
    kinds = {"path": ("string",), "index": ("int64",), "label": ("string", "int64", "null")}
    for name, allowed in kinds.items():
        known = found.names.count(name) == 1 and str(found.field(name).type) in allowed
        require(known, f"{where}: has no column {name} of type {allowed[0]}; {advice}")
    vector: Any = found.field("vector").type if found.names.count("vector") == 1 else None
    value = str(getattr(vector, "value_type", ""))
    known = str(vector).startswith("fixed_size_list") and value in PRECISIONS.values()
    require(known and 0 < vector.list_size <= MAX_WIDTH, f"{where}: has no column vector of fixed size; {advice}")


def _values(handle: Any, column: str, where: str) -> list[Any]:
    import pyarrow.compute as pc

    found: list[Any] = []
    shared: dict[Any, Any] = {None: None}  # equal labels are one string
    for group in range(handle.num_row_groups):
        for part in read_parts(handle, column, group, _limit()):
            # A long text that many rows share is stored once.
            longest = pc.max(pc.binary_length(part)).as_py() if str(part.type) == "string" else 0
            require((longest or 0) <= MAX_TEXT, f"{where}: has a {column} of {longest} bytes; give another file")
            values = part.to_pylist()
            found += [shared.setdefault(x, str(x)) for x in values] if column == "label" else values
    return found
