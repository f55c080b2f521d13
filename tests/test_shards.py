import io
import json
import logging
import multiprocessing
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import pretrain
from PIL import Image
from torch.utils.data import DataLoader

from twoview.data import BatchOrder, in_order, parquet, webdataset
from twoview.data.images import WINDOW
from twoview.errors import UserError

RNG = np.random.default_rng(0)
CLASSES = ["ant", "bee"]


def encoded(value, kind="PNG"):
    """A grey picture of one value, so that it can be known again."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(file, values, labels=None, column="image", group=5, plain=False):
    pictures = [v if isinstance(v, bytes | None) else encoded(v) for v in values]
    content = {column: pictures if plain else [{"bytes": p, "path": None} for p in pictures]}
    schema = None
    if labels is not None:
        content["label"] = labels
        features = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
        schema = {b"huggingface": json.dumps(features).encode()}
    table = pyarrow.table(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(schema), file, row_group_size=group)


def write_tar(file, samples, mode="w"):
    """``samples``: (key, {extension: bytes})."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as shard:
        for key, parts in samples:
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def options(**changes):
    return {"image_size": 16, "batch_size": 4, "num_workers": 0} | changes


def shown(images):
    """Grey values of the pictures, in their order."""
    return [int(v) for batch in in_order(images, 7) for v in batch.pixels[:, 0, 0, 0]]


def make_both(root, n=40):
    """The same pictures as two Parquet files and as two tar shards, labelled."""
    values = [5 * i for i in range(n)]
    for part, name in ((slice(0, 23), "train-0"), (slice(23, n), "train-1")):
        labels = [i % 2 for i in range(n)][part]
        write_parquet(root / "parquet" / f"{name}.parquet", values[part], labels)
        write_tar(
            root / "tar" / f"{name}.tar",
            [
                (f"{name}/{v:04d}", {"png": encoded(v), "cls": str(y).encode()})
                for v, y in zip(values[part], labels, strict=True)
            ],
        )
    return values


@pytest.mark.parametrize("memory", [None, 0])
def test_both_kinds_give_the_same_images_as_the_files_hold(tmp_path, memory):
    values = make_both(tmp_path)
    a = parquet(str(tmp_path / "parquet"), memory=memory, **options())
    b = webdataset(str(tmp_path / "tar"), memory=memory, **options())
    assert (a.classes, b.classes) == (CLASSES, ["0", "1"])
    for split in ("pretrain", "train", "test"):
        one, other = getattr(a, split), getattr(b, split)
        assert shown(one) == shown(other)
        assert torch.equal(one.labels, other.labels)
    assert sorted(shown(a.pretrain) + shown(a.test)) == values
    assert a.pretrain.blocks is not None  # in memory too, so that the order is the same
    assert b.pretrain.blocks is None
    assert a.mean_std == b.mean_std
    assert a.mean_std[0][0] == pytest.approx(np.mean(shown(a.pretrain)) / 255)


def test_batches_carry_index_and_label_and_workers_give_the_same(tmp_path):
    make_both(tmp_path)
    data = parquet(str(tmp_path / "parquet"), memory=0, **options())
    wanted = list(BatchOrder(len(data.pretrain), 4, 0, lambda: 0, blocks=data.pretrain.blocks))
    for workers, context in ((0, None), (2, "fork"), (2, "spawn")):
        context = multiprocessing.get_context(context) if context else None
        loader = DataLoader(
            data.pretrain, batch_size=None, sampler=wanted, num_workers=workers, multiprocessing_context=context
        )
        for positions, batch in zip(wanted, loader, strict=True):
            assert torch.equal(batch.ids, positions)
            assert batch.pixels.dtype == torch.uint8
            assert torch.equal(batch.labels, batch.pixels[:, 0, 0, 0] // 5 % 2)


def test_blocks_are_read_few_at_a_time_every_image_once_an_epoch():
    blocks = torch.arange(1000) // 5  # 200 blocks
    order = BatchOrder(1000, 20, 3, lambda: 0, blocks=blocks)
    epoch = torch.cat(list(order))
    assert sorted(epoch.tolist()) == list(range(1000))
    for start in range(0, 1000, WINDOW * 5):
        assert len(blocks[epoch[start : start + WINDOW * 5]].unique()) == WINDOW or start + WINDOW * 5 > 1000
    later = torch.cat(list(BatchOrder(1000, 20, 3, lambda: 57, blocks=blocks)))
    second = torch.cat(list(BatchOrder(1000, 20, 3, lambda: 50, blocks=blocks)))
    assert not torch.equal(second, epoch)
    assert torch.equal(later, second[7 * 20 :])


def test_large_row_groups_are_held_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("twoview.data.shards.KEPT_BYTES", 10)
    write_parquet(tmp_path / "a.parquet", range(40))
    data = parquet(str(tmp_path / "a.parquet"), memory=0, **options())
    assert shown(data.pretrain) == list(range(40))
    assert len(data.pretrain.source.kept) == 1


def test_ranks_read_their_own_blocks():
    blocks = torch.arange(2000) // 5
    shares = [torch.cat(list(BatchOrder(2000, 20, 0, lambda: 0, r, 2, blocks))) for r in range(2)]
    assert [len(s) for s in shares] == [1000, 1000]
    assert sorted(torch.cat(shares).tolist()) == list(range(2000))
    shared = set(blocks[shares[0]].tolist()) & set(blocks[shares[1]].tolist())
    assert len(shared) <= WINDOW


def test_a_reader_keeps_no_more_row_groups_than_training_draws_from(tmp_path):
    write_parquet(tmp_path / "a.parquet", [i % 250 for i in range(5 * 40)])
    data = parquet(str(tmp_path / "a.parquet"), memory=0, **options())
    assert shown(data.pretrain) == [i % 250 for i in range(200)]
    assert len(data.pretrain.source.kept) == WINDOW
    with pytest.raises(IndexError):
        data.pretrain.source[200]


def test_unlabelled_shards_and_an_eval_root(tmp_path):
    make_both(tmp_path)
    write_parquet(tmp_path / "plain.parquet", range(0, 200, 10), column="img", plain=True)
    data = parquet(str(tmp_path / "plain.parquet"), **options())
    assert (len(data.pretrain), data.train) == (20, None)
    write_tar(tmp_path / "plain.tar", [(f"{v}", {"png": encoded(v)}) for v in range(20)])
    data = webdataset(str(tmp_path / "plain.tar"), str(tmp_path / "tar/train-*.tar"), **options())
    assert (len(data.pretrain), len(data.train), len(data.test)) == (20, 32, 8)


def test_labels_in_json_several_files_a_sample_and_odd_names(tmp_path):
    samples = [
        ("a/1", {"json": b'{"label": "bee"}', "png": encoded(1), "txt": b"a caption"}),
        ("a/2", {"PNG": encoded(2), "seg.png": encoded(99), "json": b"not json"}),
        ("b/2", {"cls": b"ant", "jpg": encoded(3, "JPEG")}),
        ("Mütze 3", {"bmp": encoded(4, "BMP"), "cls": b"bee"}),
    ]
    write_tar(tmp_path / "s.tar", samples)
    data = webdataset(str(tmp_path / "s.tar"), **options(batch_size=2))
    assert [data.classes[i] if i >= 0 else None for i in data.pretrain.labels] == ["bee", None, "ant", "bee"]
    assert shown(data.pretrain) == [1, 2, 3, 4]


def test_numbers_as_class_names_keep_their_order(tmp_path):
    write_tar(tmp_path / "s.tar", [(str(i), {"png": encoded(i), "cls": str(i % 12).encode()}) for i in range(48)])
    assert webdataset(str(tmp_path / "s.tar"), **options()).classes == [str(i) for i in range(12)]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_broken_pictures_are_left_out_and_named(tmp_path, caplog, kind):
    bad = [encoded(7)[:40], b"", None if kind == "parquet" else b"text"]
    pictures = [encoded(v) for v in range(30)] + bad
    if kind == "parquet":
        write_parquet(tmp_path / "x.parquet", pictures)
        load, file = parquet, tmp_path / "x.parquet"
    else:
        write_tar(tmp_path / "x.tar", [(str(i), {"png": p}) for i, p in enumerate(pictures)])
        load, file = webdataset, tmp_path / "x.tar"
    with caplog.at_level(logging.INFO):
        data = load(str(file), max_broken=0.1, **options())
    assert len(data.pretrain) == 30
    assert [name.startswith(str(file)) for name, _ in data.broken] == [True] * 3
    assert "30 pictures (30 packed)" in caplog.text
    with pytest.raises(UserError, match=r"3 of 33 files cannot be read.*data.max_broken"):
        load(str(file), **options())


@pytest.mark.parametrize(
    ("make", "knobs", "sentence"),
    [
        (lambda d: None, {}, r"no \.parquet file there"),
        (lambda d: (d / "x.parquet").write_bytes(b"nothing"), {}, "cannot be read as Parquet"),
        (lambda d: write_parquet(d / "x.parquet", []), {}, "no rows"),
        (lambda d: write_parquet(d / "x.parquet", [1, 2], column="photo"), {}, "the columns of data.root are photo"),
        (lambda d: write_parquet(d / "x.parquet", [1]), {"label_column": "kind"}, "data.label_column=kind"),
        (
            lambda d: write_parquet(d / "x.parquet", [1, 2], [0, 7]),
            {},
            "data.label_column=label: holds no class numbers",
        ),
        (
            lambda d: [write_parquet(d / s / "0000.parquet", [1]) for s in ("train", "validation")],
            {},
            r"several splits \(train, valid\); give a pattern",
        ),
        (
            lambda d: [write_parquet(d / f"{s}-0.parquet", [1]) for s in ("train", "test")],
            {},
            r"several splits \(test, train\); give a pattern",
        ),
    ],
)
def test_parquet_mistakes(tmp_path, make, knobs, sentence):
    make(tmp_path)
    with pytest.raises(UserError, match=sentence):
        parquet(str(tmp_path), **options(), **knobs)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.tar", b"", "cannot be read as an uncompressed tar file"),
        ("x.tar", b"no tar file at all" * 100, "cannot be read as an uncompressed tar file"),
        ("x.tar.gz", None, "cannot be read as an uncompressed tar file"),
        ("x.zip", b"", r"no \.tar file there"),
    ],
)
def test_tar_mistakes(tmp_path, name, content, sentence):
    if content is None:
        write_tar(tmp_path / name, [("1", {"png": encoded(1)})], "w:gz")
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        webdataset(str(tmp_path), **options())


def test_a_truncated_shard_and_one_without_pictures(tmp_path):
    write_tar(tmp_path / "x.tar", [(str(i), {"png": encoded(i)}) for i in range(9)])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 1024 * 3 + 700])
    with pytest.raises(UserError, match="cannot be read|cannot be read as an uncompressed"):
        webdataset(str(tmp_path), **options())
    write_tar(tmp_path / "x.tar", [("1", {"txt": b"words"})])
    with pytest.raises(UserError, match="no pictures in"):
        webdataset(str(tmp_path), **options())
    with pytest.raises(UserError, match="copy them to one first"):
        webdataset("https://example.org/{000..100}.tar", **options())


def test_a_run_from_parquet_that_does_not_fit(tmp_path):
    make_both(tmp_path, 60)
    data = parquet(str(tmp_path / "parquet"), memory=0, **options(num_workers=2, batch_size=8))
    report = pretrain(tmp_path / "run", data=data, backbone={"name": "test_resnet", "image_size": 16})
    assert report["training"]["images_seen"] == report["training"]["steps"] * 8
    assert report["results"]["trained"]["knn"]["test_top1"] >= 0
