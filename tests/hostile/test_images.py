"""Images from anyone: no other program is started, nothing blocks, no file takes more memory than an image may."""

import io
import os
import resource
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile_runs import run
from PIL import Image

from twoview.data import folder, parquet, square, webdataset
from twoview.data.decode import _check_inflated
from twoview.data.webdataset import _json_label
from twoview.errors import UserError

FEW = {"image_size": 16, "num_workers": 0}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touched) (w) file closefile\nshowpage\n"


def picture(side=24):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png(side=24):
    file = io.BytesIO()
    picture(side).save(file, "PNG")
    return file.getvalue()


def npy(shape, kind="<f8"):
    """A .npy file whose header promises an array of some shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue() + b"\0" * 64


def png_bomb(side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def tiff_bomb(shape):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros(shape, dtype=np.uint16), compression="zlib", photometric="minisblack")
    return file.getvalue()


BROKEN = {
    "eps": EPS,
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "pdf": b"%PDF-1.4\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "empty": b"",
    "half": png()[:200],
    "png bomb": png_bomb(60_000),
    "npy of objects": npy((2, 2), "|O"),
    "npy bomb": npy((100_000, 100_000)),
    "npy of many channels": npy((16, 16, 10**9)),
    "npy of negative size": npy((-1, 4)),
    "npy that ends early": npy((64, 64)),
    "tiff bomb": tiff_bomb((70, 4000, 4000)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_image_is_broken_and_takes_no_memory(tmp_path, name):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png())
    (tmp_path / "x.png").write_bytes(BROKEN[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "tiff bomb":  # only tifffile reads 70 channels
        with pytest.raises(ValueError, match="larger than"):
            square(BROKEN[name], 16, 70)
    else:
        data = folder(str(tmp_path), max_broken=0.5, **FEW)
        assert [file for file, _ in data.broken] == [str(tmp_path / "x.png")]
    # In kB. The limit is far below what the headers promise.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize("name", ["eps", "npy bomb", "png bomb"])
def test_the_same_content_in_a_table_or_shard_is_broken(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": png(), "path": "a"}] * 3 + [{"bytes": BROKEN[name], "path": "b"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "t.parquet")
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for number, row in enumerate(rows):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(row["bytes"])
            shard.addfile(member, io.BytesIO(row["bytes"]))
    for load, file in ((parquet, "t.parquet"), (webdataset, "s.tar")):
        data = load(str(tmp_path / file), max_broken=0.5, **FEW)
        assert (len(data.pretrain), len(data.broken)) == (3, 1)


def shards(folder, images=60, size=2000):
    """One shard with labels; random content, so that a change of it is seen only in the headers."""
    draw = np.random.default_rng(0)
    with tarfile.open(folder / "s.tar", "w") as shard:
        for number in range(images):
            for name, content in ((f"{number}.png", png() + draw.bytes(size)), (f"{number}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return folder / "s.tar"


def set_byte(content, place, value):
    return content[:place] + bytes([value]) + content[place + 1 :]


DAMAGED = {
    "truncated in a member": lambda c: c[: len(c) // 2 + 77],
    "truncated between blocks": lambda c: c[: len(c) // 1024 * 512],
    "without its end": lambda c: c.rstrip(b"\0") + b"\0" * (-len(c.rstrip(b"\0")) % 512),
    "a damaged header": lambda c: set_byte(c, c.index(b"30.png"), 0xFF),
    "zeros in the middle": lambda c: c[: c.index(b"30.png")] + b"\0" * 1024 + c[c.index(b"30.png") :],
    "two archives in one": lambda c: c + c,
    "empty": lambda c: b"",
    "text": lambda c: b"hello",
    "compressed": lambda c: zlib.compress(c),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_shards_are_refused_instead_of_losing_images(tmp_path, name):
    file = shards(tmp_path)
    file.write_bytes(DAMAGED[name](file.read_bytes()))
    with pytest.raises(UserError, match=r"s\.tar cannot be read as an uncompressed tar file"):
        webdataset(str(file), **FEW)


LABELS = {
    b'{"label": 3}': "3",
    b'{"cls": "a"}': "a",
    b'{"label": -1}': None,
    b'{"label": ""}': None,
    b'{"label": [1]}': None,
    b'{"label": {"a": 1}}': None,
    b'{"label": NaN}': None,
    b"[1]": None,
    b"{": None,
    b"[" * 100_000: None,
    b"\xff\xfe": None,
}


@pytest.mark.parametrize("content", LABELS, ids=range(len(LABELS)))
def test_odd_json_is_no_label(content):
    assert _json_label(content.decode("utf-8", "replace")) == LABELS[content]


@pytest.mark.parametrize(
    ("knobs", "name"),
    [
        (["data=folder", "data.root=."], "x.png"),
        (["data=folder", "data.root=list.csv"], "list.csv"),
        (["data=folder", "data.root=list.txt"], "list.txt"),
        (["data=webdataset", "data.root=s.tar"], "s.tar"),
        (["data=webdataset", "data.root=."], "s.tar"),
        (["data=parquet", "data.root=t.parquet"], "t.parquet"),
        (["data=parquet", "data.root=."], "t.parquet"),
        (["data=parquet", "data.root='*.parquet'"], "t.parquet"),
    ],
)
def test_nothing_waits_for_a_fifo(tmp_path, knobs, name):
    (tmp_path / "work").mkdir()
    os.mkfifo(tmp_path / "work" / name)
    found = run(tmp_path / "work", *knobs, "data.image_size=16")
    assert found.refused("data.root"), found


def test_strings_of_a_table_are_opened_only_if_asked(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png())
    table = pyarrow.table({"image": [f"{i}.png" for i in range(4)]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"data.image_column=image: holds strings; set data.read_paths=true"):
        parquet(str(tmp_path / "t.parquet"), **FEW)
    assert len(parquet(str(tmp_path / "t.parquet"), read_paths=True, **FEW).pretrain) == 4


def test_files_that_vanish_are_replaced_counted_and_named_once(tmp_path, caplog):
    for i in range(40):
        (tmp_path / f"{i:02}.png").write_bytes(png())
    data = folder(str(tmp_path), memory=0, cache=False, max_broken=0.5, **FEW)
    for i in range(20):  # a row of files that is longer than any fixed number of attempts
        (tmp_path / f"{i:02}.png").unlink()
    for _ in range(2):
        assert len(data.pretrain[list(range(40))].pixels) == 40
    assert [caplog.text.count(f"{i:02}.png can no longer be read") for i in range(40)] == [1] * 20 + [0] * 20
    (tmp_path / "20.png").unlink()
    with pytest.raises(UserError, match=r"data.max_broken=0.5: 21 of 40 images can no longer be read"):
        data.pretrain[[20]]


def test_a_replacement_has_its_own_position_and_the_label_of_the_lost_image(tmp_path):
    for i in range(40):
        target = tmp_path / "ab"[i % 2] / f"{i:02}.png"
        target.parent.mkdir(exist_ok=True)
        picture(20 + i).save(target)
    data = folder(str(tmp_path), memory=0, cache=False, max_broken=0.5, **FEW).pretrain
    victim = int(data.positions[3])
    Path(data.source[victim]).unlink()
    found, whole = data[[3]], data[[4]]
    assert int(found.labels) == int(data.labels[3])
    assert int(found.ids) != 3
    assert int(data.labels[int(found.ids)]) == int(found.labels)
    assert len(whole.pixels) == 1


def test_a_segment_that_inflates_to_more_than_an_image_is_refused():
    bomb = zlib.compress(bytes(2**30), 9)
    with pytest.raises(ValueError, match="larger than"):
        _check_inflated(io.BytesIO(bomb), [0], [len(bomb)])


def test_out_of_memory_is_no_broken_file(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr("twoview.data.scan.whole_and_shape", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match=r"data.root: out of memory; the images need 0 MB; set data.memory=0"):
        folder(str(tmp_path), **FEW)
