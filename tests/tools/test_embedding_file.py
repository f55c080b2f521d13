"""Reading of files of embeddings that anyone may have written."""

import builtins
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from twoview.errors import UserError
from twoview.tools import read_embeddings

COLUMNS = {"path": ["a", "b"], "index": [0, 2], "label": ["x", None], "vector": [[1.0, 2.0], [3.0, 4.0]]}


def write(file, metadata=None, width=2, **columns):
    vector = pa.array(columns.pop("vector", COLUMNS["vector"]), pa.list_(pa.float32(), width))
    table = pa.table({**COLUMNS, **columns, "vector": vector})
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), file, write_page_checksum=True)
    return file


def test_content_in_memory_and_in_a_file(tmp_path):
    metadata = {b"twoview.checkpoint": b"abc", b"twoview.card": b'{"method": "SimCLR"}', b"twoview.plan": b"{broken"}
    file = write(tmp_path / "a.parquet", metadata)
    for memory in (None, 0):
        found = read_embeddings(file, memory, str(tmp_path))
        assert list(found.paths) == ["a", "b"]
        assert found.indices.tolist() == [0, 2]
        assert found.labels == ["x", None]
        assert torch.equal(found.vectors, torch.tensor(COLUMNS["vector"]))
        assert found.metadata == {"checkpoint": "abc", "card": {"method": "SimCLR"}}
    numbers = write(tmp_path / "b.parquet", label=[7, None])
    assert read_embeddings(numbers).labels == ["7", None]


def _other_columns(file):
    pyarrow.parquet.write_table(pa.table({"path": ["a"]}), file)


def _damaged(file):
    table = pyarrow.parquet.read_table(write(file, vector=[[1.25, 2.5], [3.75, 5.5]]))
    pyarrow.parquet.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
    content = file.read_bytes()
    value = np.float32(3.75).tobytes()
    assert value in content
    file.write_bytes(content.replace(value, np.float32(3.5).tobytes()))


FILES = {
    "missing": (lambda file: None, "No such file"),
    "text": (lambda file: file.write_text("path,index\n"), "cannot be read as Parquet"),
    "empty": (lambda file: file.write_bytes(b""), "cannot be read as Parquet"),
    "cut off": (lambda file: file.write_bytes(write(file).read_bytes()[:-30]), "cannot be read as Parquet"),
    "damaged": (_damaged, "cannot be read as Parquet"),
    "fifo": (os.mkfifo, "not a regular file"),
    "other columns": (_other_columns, "has no column index"),
    "type": (lambda file: write(file, index=[0.5, 1.5]), "has no column index of type int64"),
    "width": (lambda file: write(file, vector=[[0.0] * 2**18] * 2, width=2**18), "no column vector"),
    "nan": (lambda file: write(file, vector=[[1, 2], [np.nan, 1]]), "not finite"),
    "null value": (lambda file: write(file, vector=[[1, 2], [None, 1]]), "not finite"),
    "null vector": (lambda file: write(file, vector=[[1, 2], None]), "without a vector"),
    "null path": (lambda file: write(file, path=["a", None]), "without a path"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_file_of_embeddings_is_refused_by_one_sentence(kind, tmp_path):
    make, message = FILES[kind]
    file = tmp_path / "a.parquet"
    make(file)
    with pytest.raises(UserError, match=message) as refused:
        read_embeddings(file, knob="reference")
    assert str(refused.value).startswith(f"reference={file}: ")


def test_a_long_text_that_many_rows_share_is_refused(tmp_path):
    rows = 200
    knobs = {"index": range(rows), "label": [None] * rows, "vector": [[1.0, 2.0]] * rows}
    file = write(tmp_path / "a.parquet", path=["x" * 100_000] * rows, **knobs)
    assert file.stat().st_size < 1_000_000
    with pytest.raises(UserError, match="path of 100000 bytes"):
        read_embeddings(file)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    def missing(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *rest)

    original = builtins.__import__
    file = write(tmp_path / "a.parquet")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r'pip install "twoview\[parquet\]"'):
        read_embeddings(file)
