"""Reading the Parquet file of embeddings."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from twoview.errors import UserError
from twoview.tools import Index
from twoview.tools.embedding_file import read_embeddings

METADATA = {b"twoview.checkpoint": b"0123", b"twoview.card": json.dumps({"method": "SimCLR"}).encode()}


def write(file, vectors, labels=None, metadata=METADATA, rows=7, **changes):
    """Embeddings in row groups of a few rows; ``changes`` are other columns."""
    values = pa.array(vectors.numpy().reshape(-1))
    columns = {
        "path": [f"a/Bild {i} ü.jpg" for i in range(len(vectors))],
        "index": pa.array(range(len(vectors)), pa.int64()),
        "vector": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1]),
        **({} if labels is None else {"label": labels}),
        **changes,
    }
    columns = {name: value for name, value in columns.items() if value is not None}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file, row_group_size=rows)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("labels", [None, ["cat", None] * 10, [3, None] * 10])
def test_all_rows_are_read(dtype, labels, tmp_path):
    vectors = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = read_embeddings(write(tmp_path / "a.parquet", vectors, labels))
    assert torch.equal(found.vectors, vectors)
    assert found.paths == [f"a/Bild {i} ü.jpg" for i in range(20)]
    assert found.labels == [None if label is None else str(label) for label in labels or [None] * 20]
    assert found.indices.tolist() == list(range(20))
    assert found.metadata == {"checkpoint": "0123", "card": {"method": "SimCLR"}}
    index = Index.build(None, tmp_path / "a.parquet")
    assert index.search("0123", vectors[3:4], k=1).paths == [["a/Bild 3 ü.jpg"]]


def test_few_rows_are_decoded_at_once_if_their_texts_could_be_large(tmp_path, monkeypatch):
    monkeypatch.setattr("twoview.tools.embedding_file.BATCH_BYTES", 4096)
    paths = ["x" * 3000] * 50
    found = read_embeddings(write(tmp_path / "a.parquet", torch.ones(50, 3), rows=50, path=paths))
    assert found.paths == paths


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "column path is missing"),
        ({"path": [None, "a", "b"]}, "without path"),
        ({"index": [1.0, 2.0, 3.0]}, "column index is double"),
        ({"index": pa.array([1, None, 3])}, "without path, index"),
        ({"label": [1.5, 2.5, 3.5]}, "column label is double"),
        ({"vector": [[1.0], [2.0], [3.0]]}, "not a list of a fixed number"),
        ({"vector": pa.array([[1, 2]] * 3, pa.list_(pa.int32(), 2))}, "not a list of a fixed number"),
        ({"vector": pa.array([[1.0, 2.0], None, [1.0, 2.0]], pa.list_(pa.float32(), 2))}, "without path"),
        ({"vector": pa.array([[1.0, 2.0], [1.0, None], [1.0, 2.0]], pa.list_(pa.float32(), 2))}, "without path"),
    ],
)
def test_other_columns_are_refused(changes, message, tmp_path):
    file = write(tmp_path / "a.parquet", torch.ones(3, 2), **changes)
    with pytest.raises(UserError, match=message):
        read_embeddings(file)


@pytest.mark.parametrize(
    "metadata",
    [{}, METADATA | {b"twoview.checkpoint": b"\xff"}, METADATA | {b"twoview.card": b"[" * 10**5}],
)
def test_metadata_that_cannot_be_read_are_left_out(metadata, tmp_path):
    file = write(tmp_path / "a.parquet", torch.ones(3, 2), metadata=metadata)
    found = read_embeddings(file).metadata
    assert found.keys() < {"checkpoint", "card"}
    if "checkpoint" not in found:
        with pytest.raises(UserError, match="do not name their checkpoint"):
            Index.build(None, file)


@pytest.mark.parametrize("name", [b"twoview.card", b"twoview.preprocessing"])
def test_metadata_of_another_type_are_refused(name, tmp_path):
    file = write(tmp_path / "a.parquet", torch.ones(3, 2), metadata=METADATA | {name: b"[1]"})
    with pytest.raises(UserError, match="metadata are damaged"):
        Index.build(None, file)


def test_other_files_are_refused(tmp_path):
    whole = write(tmp_path / "a.parquet", torch.ones(3, 2)).read_bytes()
    for content in (b"", b"PAR1", whole[:-9], whole[:40] + whole[60:]):
        (tmp_path / "b.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.parquet"):
            read_embeddings(tmp_path / "b.parquet")


def test_vectors_that_are_not_finite_are_named(tmp_path):
    vectors = torch.ones(30, 2)
    vectors[8, 1] = torch.inf
    with pytest.raises(UserError, match="1 of 30 are not finite, such as a/Bild 8"):
        Index.build(None, write(tmp_path / "a.parquet", vectors))
