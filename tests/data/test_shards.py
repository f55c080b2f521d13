import importlib
import logging
import multiprocessing

import numpy as np
import pytest
import torch
from data.image_files import CLASSES, encoded, make_both, options, write_parquet, write_tar
from torch.utils.data import DataLoader

from twoview.data import in_order, parquet, webdataset
from twoview.data.images import WINDOW
from twoview.errors import UserError


def shown(images):
    """Gray values of the images, in their order."""
    return [int(v) for batch in in_order(images, 7) for v in batch.pixels[:, 0, 0, 0]]


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
    wanted = list(torch.randperm(32, generator=torch.Generator().manual_seed(0)).split(4))
    for workers, context in ((0, None), (2, "fork"), (1, "spawn")):
        context = multiprocessing.get_context(context) if context else None
        loader = DataLoader(
            data.pretrain, batch_size=None, sampler=wanted, num_workers=workers, multiprocessing_context=context
        )
        for positions, batch in zip(wanted, loader, strict=True):
            assert torch.equal(batch.ids, positions)
            assert batch.pixels.dtype == torch.uint8
            assert torch.equal(batch.labels, batch.pixels[:, 0, 0, 0] // 5 % 2)


def test_large_row_groups_are_held_one_at_a_time(tmp_path, monkeypatch):
    module = importlib.import_module("twoview.data.parquet")  # twoview.data.parquet is the function
    monkeypatch.setattr(module, "CACHE_BYTES", 10)
    write_parquet(tmp_path / "a.parquet", range(40))
    data = parquet(str(tmp_path / "a.parquet"), memory=0, **options())
    assert shown(data.pretrain) == list(range(40))
    assert len(data.pretrain.source.cached) == 1


def test_a_reader_keeps_no_more_row_groups_than_training_draws_from(tmp_path):
    write_parquet(tmp_path / "a.parquet", [i % 250 for i in range(5 * 40)])
    data = parquet(str(tmp_path / "a.parquet"), memory=0, **options())
    assert shown(data.pretrain) == [i % 250 for i in range(200)]
    assert len(data.pretrain.source.cached) == WINDOW
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
def test_broken_images_are_left_out_and_named(tmp_path, caplog, kind):
    bad = [encoded(7)[:40], b"", None if kind == "parquet" else b"text"]
    images = [encoded(v) for v in range(30)] + bad
    if kind == "parquet":
        write_parquet(tmp_path / "x.parquet", images)
        load, file = parquet, tmp_path / "x.parquet"
    else:
        write_tar(tmp_path / "x.tar", [(str(i), {"png": p}) for i, p in enumerate(images)])
        load, file = webdataset, tmp_path / "x.tar"
    with caplog.at_level(logging.INFO):
        data = load(str(file), max_broken=0.1, **options())
    assert len(data.pretrain) == 30
    assert [name.startswith(str(file)) for name, _ in data.broken] == [True] * 3
    assert "30 images (30 packed)" in caplog.text
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


def test_a_truncated_shard_and_one_without_images(tmp_path):
    write_tar(tmp_path / "x.tar", [(str(i), {"png": encoded(i)}) for i in range(9)])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 1024 * 3 + 700])
    with pytest.raises(UserError, match="cannot be read|cannot be read as an uncompressed"):
        webdataset(str(tmp_path), **options())
    write_tar(tmp_path / "x.tar", [("1", {"txt": b"words"})])
    with pytest.raises(UserError, match="no images in"):
        webdataset(str(tmp_path), **options())
    with pytest.raises(UserError, match="copy them to one first"):
        webdataset("https://example.org/{000..100}.tar", **options())
