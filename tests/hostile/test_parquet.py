"""Parquet files whose rows take far more memory than the file."""

import contextlib
import importlib
import re

import pytest
from data.image_files import encoded, options, write_parquet
from hostile_runs import SHORT, run

from twoview.data import parquet
from twoview.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
writer = pytest.importorskip("pyarrow.parquet")
module = importlib.import_module("twoview.data.parquet")  # twoview.data.parquet is the function
MB = 10**6


@contextlib.contextmanager
def at_most(size):
    """Pyarrow allocates at most this many bytes."""
    before = pyarrow.default_memory_pool()
    counted = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(counted)
    try:
        yield
    finally:
        pyarrow.set_memory_pool(before)
        assert counted.max_memory() <= size


def image(size, value=7):
    """An encoded image of some bytes."""
    return encoded(value).ljust(size, b"\0")


def shared_value(file, rows, size, nested=True):
    """Rows that refer to one value."""
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows), pyarrow.array([image(size)]))
    if nested:
        values = pyarrow.StructArray.from_arrays([values, pyarrow.nulls(rows, pyarrow.string())], ["bytes", "path"])
    writer.write_table(pyarrow.table({"image": values}), file, store_schema=False)


def shared_prefix(file, rows, size):
    """Rows that differ in their last byte, of which only this byte is stored."""
    values = [image(size) + bytes([i % 256]) for i in range(rows)]
    encoding = {"image": "DELTA_BYTE_ARRAY"}
    writer.write_table(pyarrow.table({"image": values}), file, use_dictionary=False, column_encoding=encoding)


FILES = {
    "value": shared_value,
    "plain value": lambda file, rows, size: shared_value(file, rows, size, nested=False),
    "prefix": shared_prefix,
}


@pytest.mark.parametrize("name", FILES)
def test_a_value_that_many_rows_share_is_measured_before_it_is_decoded_for_all(name, tmp_path, monkeypatch):
    FILES[name](tmp_path / "x.parquet", 100, MB)
    assert (tmp_path / "x.parquet").stat().st_size < 1.5 * MB
    monkeypatch.setattr(module, "GROUP_BYTES", 8 * MB)
    expected = "100 of 100 files cannot be read .*x.parquet, row 0 of row group 0 .*take more than 0.0 GB; write the"
    with pytest.raises(UserError, match=expected), at_most(20 * MB):
        parquet(str(tmp_path / "x.parquet"), **options())


def test_two_gigabytes_in_a_file_of_one_megabyte_are_refused(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    shared_value(work / "x.parquet", 2200, MB)
    arguments = ("data=parquet", "data.root=x.parquet", "data.num_workers=0", "hydra.run.dir=runs/r")
    found = run(work, *SHORT, *arguments, limit=60)
    assert found.refused("data.root: 2200 of 2200 files cannot be read (first: x.parquet, row 0 of row group 0"), found


def test_rows_of_a_group_that_is_too_large_are_broken_and_the_others_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP_BYTES", 8 * MB)
    shared_value(tmp_path / "a.parquet", 10, MB)
    write_parquet(tmp_path / "b.parquet", range(30))
    data = parquet(str(tmp_path), max_broken=0.3, **options())
    assert len(data.pretrain) == 30
    assert {re.sub("row .* of", "of", name) for name, _ in data.broken} == {f"{tmp_path}/a.parquet, of row group 0"}
    assert len(data.broken) == 10


@pytest.mark.parametrize("memory", [None, 0])
def test_rows_that_share_a_value_and_fit_are_read(tmp_path, memory):
    shared_value(tmp_path / "a.parquet", 1500, 2000)
    data = parquet(str(tmp_path), memory=memory, **options())
    assert data.pretrain[[0, 1100, 1499]].pixels[:, 0, 0, 0].tolist() == [7, 7, 7]


def test_a_row_group_that_is_stored_with_too_many_bytes_is_refused_before_it_is_read(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", [image(MB, i) for i in range(12)], group=12)
    monkeypatch.setattr(module, "GROUP_BYTES", 10 * MB)
    sentence = r"data.root: .*x.parquet: has a row group of 0.0 GB, but at most 0.0 GB are read at once; write the file"
    with pytest.raises(UserError, match=sentence), at_most(MB):
        parquet(str(tmp_path / "x.parquet"), **options())
    write_parquet(tmp_path / "x.parquet", [image(MB, i) for i in range(12)], group=6)
    assert len(parquet(str(tmp_path / "x.parquet"), **options()).pretrain) == 12


def test_a_class_name_that_many_rows_share_is_held_once(tmp_path):
    names = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3000), pyarrow.array(["x" * MB]))
    rows = {"image": [encoded(7)] * 3000, "label": names}
    writer.write_table(pyarrow.table(rows), tmp_path / "x.parquet", store_schema=False)
    file = writer.ParquetFile(tmp_path / "x.parquet")
    with at_most(40 * MB):
        found = module._label_names(file, "label", 40 * MB)
    assert (len(found), len({id(name) for name in found})) == (3000, 1)


def test_more_rows_than_can_be_listed_are_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", range(20))
    monkeypatch.setattr(module, "ROW_BYTES", 10**15)
    with pytest.raises(UserError, match=r"x.parquet: a list of 20 images: needs 20,000,000.0 GB of memory, but"):
        parquet(str(tmp_path), **options())
