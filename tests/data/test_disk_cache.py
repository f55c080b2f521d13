"""The cache of decoded images: hits, damage, killed and simultaneous builds, disks without room."""

import logging
import multiprocessing
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from data.image_files import encoded, load, make_both, make_folder, options, photo, write_parquet
from data.test_whole_images import mixed
from PIL import Image
from short_runs import CPU, losses, pretrain

from twoview.backbones import create_backbone
from twoview.data import LazyImages, TensorImages, in_order, parquet, webdataset
from twoview.data.disk_cache import default_folder, files_fingerprint
from twoview.errors import UserError


def stored(root, cache, **changes):
    """Images that are kept in a cache."""
    return load(root, memory=0, cache=str(cache), **changes)


def everything(data):
    """All pixels, sizes, labels and statistics of the splits, in their order."""
    parts = []
    for split in (data.pretrain, data.train, data.test):
        for batch in in_order(split, 7):
            parts += [batch.pixels, batch.labels, torch.zeros(0) if batch.sizes is None else batch.sizes]
        parts.append(split.statistics())
    return parts


def assert_equal(data, other):
    for ours, theirs in zip(everything(data), everything(other), strict=True):
        assert torch.equal(ours, theirs)
    assert data.fingerprint == other.fingerprint
    assert data.mean_std == other.mean_std
    assert data.broken == other.broken


@pytest.fixture
def many(tmp_path):
    """A folder whose images take several chunks to decode."""
    root = tmp_path / "many"
    for i, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for j in range(450):
            photo(30 + j % 7, 40 - j % 5).save(root / name / f"{j:03d}.png")
        Image.new("L", (9 + i, 7)).save(root / name / "small.png")
    return root


def files_of(cache, *suffixes):
    return sorted(file for file in cache.iterdir() if file.suffix in suffixes)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_ways_to_hold_the_images_give_the_same(many, tmp_path, workers, caplog):
    (many / "ant" / "broken.png").write_text("no")
    caplog.set_level(logging.INFO)
    held, lazy = load(many, num_workers=workers), load(many, memory=0, num_workers=workers)
    built, hit = (stored(many, tmp_path / "cache", num_workers=workers) for _ in range(2))
    kinds = [type(data.pretrain) for data in (held, lazy, built, hit)]
    assert kinds == [TensorImages, LazyImages, TensorImages, TensorImages]
    assert built.pretrain.size == 32
    for data in (lazy, built, hit):
        assert_equal(held, data)
    assert caplog.text.count("is decoded once into") == 1
    assert caplog.text.count("902 decoded images are taken from") == 1
    assert [file.name for file in files_of(tmp_path / "cache", ".tmp")] == []
    (pixels,) = files_of(tmp_path / "cache", ".pixels")
    assert pixels.stat().st_size == 902 * 3 * 32 * 32


def test_the_canvases_of_small_images_are_small(tmp_path):
    make_folder(tmp_path / "images")  # 20 by 28 pixels, below the limit of 32
    data = stored(tmp_path / "images", tmp_path / "cache")
    (pixels,) = files_of(tmp_path / "cache", ".pixels")
    assert (data.pretrain.size, pixels.stat().st_size) == (28, 24 * 3 * 28 * 28)


def test_splits_share_the_file_and_a_batch_copies_no_more_than_itself(tmp_path):
    data = stored(mixed(tmp_path / "images"), tmp_path / "cache")
    addresses = {split.pixels.data_ptr() for split in (data.pretrain, data.train, data.test)}
    assert len(addresses) == 1
    batch = data.pretrain.subset(torch.tensor([4, 2, 9]))[[2, 0]]
    assert batch.pixels.untyped_storage().nbytes() == 2 * 3 * 32 * 32
    assert torch.equal(batch.pixels, data.pretrain[[9, 4]].pixels)
    assert torch.equal(batch.sizes, data.pretrain[[9, 4]].sizes)
    assert data.pretrain.subset(torch.tensor([4, 2])).name(1) == data.pretrain.name(2)


def test_another_size_number_of_channels_or_list_is_another_cache(tmp_path):
    make_folder(tmp_path / "images")
    for changes in ({}, {"store_size": 20}, {"channels": 1}, {"image_size": 12}):
        stored(tmp_path / "images", tmp_path / "cache", **changes)
    assert len(files_of(tmp_path / "cache", ".pixels")) == 4
    photo().save(tmp_path / "images" / "ant" / "more.png")
    assert len(stored(tmp_path / "images", tmp_path / "cache").pretrain) == 20
    assert len(files_of(tmp_path / "cache", ".pixels")) == 5
    stored(tmp_path / "images", tmp_path / "cache", max_broken=0.5, batch_size=3)  # the pixels are the same
    assert len(files_of(tmp_path / "cache", ".pixels")) == 5


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_file_that_was_replaced_is_decoded_again(tmp_path, change):
    make_folder(tmp_path / "images")
    before = stored(tmp_path / "images", tmp_path / "cache")
    file = tmp_path / "images" / "ant" / "3.png"
    status = file.stat()
    if change == "size":
        photo(50, 50).save(file)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        changed = bytearray(file.read_bytes())
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert len(changed) == status.st_size
    after = stored(tmp_path / "images", tmp_path / "cache")
    assert len(files_of(tmp_path / "cache", ".pixels")) == 2
    assert (after.fingerprint == before.fingerprint) == (change == "time")
    assert_equal(after, load(tmp_path / "images"))


def test_files_are_told_apart_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "a")
    first = files_fingerprint([str(tmp_path / "a"), str(tmp_path / "b")])
    (tmp_path / "b").write_text("")
    assert len({first, files_fingerprint([str(tmp_path / x) for x in "ab"]), files_fingerprint([], b"x")}) == 3
    assert files_fingerprint(["ab", "c"]) != files_fingerprint(["a", "bc"])
    assert files_fingerprint([], b"ab", b"c") != files_fingerprint([], b"a", b"bc")


def test_a_broken_file_that_can_be_read_again_is_not_left_out(tmp_path):
    make_folder(tmp_path / "images")
    file = tmp_path / "images" / "bee" / "4.png"
    content, status = file.read_bytes(), file.stat()
    file.write_bytes(bytes(len(content)))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    first = stored(tmp_path / "images", tmp_path / "cache", max_broken=0.1)
    assert [name for name, _ in first.broken] == [str(file)]
    again = stored(tmp_path / "images", tmp_path / "cache", max_broken=0.1)
    assert again.broken == first.broken
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert stored(tmp_path / "images", tmp_path / "cache").broken == []


def test_too_many_broken_files_leave_no_cache(tmp_path):
    make_folder(tmp_path / "images")
    (tmp_path / "images" / "ant" / "broken.png").write_text("no")
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 25 files cannot be read"):
            stored(tmp_path / "images", tmp_path / "cache")
        assert files_of(tmp_path / "cache", ".pixels", ".pt", ".tmp") == []


def test_a_killed_build_leaves_nothing_that_is_used(many, tmp_path, caplog):
    cache = tmp_path / "cache"
    child = multiprocessing.get_context("fork").Process(target=stored, args=(many, cache))
    child.start()
    while child.is_alive() and not (list(cache.glob("*.pixels.*.tmp")) if cache.exists() else []):
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [file.name.split(".")[1] for file in files_of(cache, ".tmp")] == ["pixels"]
    assert files_of(cache, ".pixels", ".pt") == []
    old = cache / f"{'0' * 32}.pixels.1.tmp"  # of another data set, long ago
    young = cache / f"{'1' * 32}.pixels.1.tmp"  # of another data set, which may be at work
    for file in (old, young):
        file.write_bytes(b"")
    os.utime(old, (0, 0))
    assert_equal(stored(many, cache), load(many))
    assert files_of(cache, ".tmp") == [young]


def build(root, cache, start, results):
    start.wait()
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("twoview").addHandler(handler)
    logging.getLogger("twoview").setLevel(logging.INFO)
    data = stored(root, cache)
    results.put(("decoded once" in " ".join(messages), data.fingerprint, type(data.pretrain).__name__))


def test_of_two_processes_one_decodes_and_both_use_it(many, tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=build, args=(many, tmp_path / "cache", start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(decoded for decoded, *_ in found) == [False, True]
    assert {rest for _, *rest in map(tuple, found) for rest in [tuple(rest)]} == {
        (load(many).fingerprint, "TensorImages")
    }


def test_a_disk_without_room_is_left_alone(tmp_path, disk, caplog):
    caplog.set_level(logging.INFO)
    make_folder(tmp_path / "images")
    needed = 24 * 3 * 32 * 32
    for total, free in ((10 * needed, 2 * needed - 1), (10**15, 10**10 + needed - 1)):
        disk(total, free)
        assert isinstance(stored(tmp_path / "images", tmp_path / "cache").pretrain, LazyImages)
    assert "is not cached: up to 0.0 GB" in caplog.text
    assert "would leave less than 10.0 GB of the disk free (now 10.0 GB)" in caplog.text
    assert files_of(tmp_path / "cache", ".pixels", ".pt", ".tmp") == []


@pytest.mark.parametrize(("total", "kept"), [(10**6, 10**5), (10**15, 10**10)])
def test_a_cache_leaves_10_gb_or_a_tenth_of_the_disk_free(tmp_path, disk, total, kept, caplog):
    caplog.set_level(logging.INFO)
    make_folder(tmp_path / "images")
    disk(total, kept + 24 * 3 * 32 * 32)
    assert isinstance(stored(tmp_path / "images", tmp_path / "cache").pretrain, TensorImages)
    assert "is decoded once into" in caplog.text
    assert "data.cache=false" in caplog.text
    disk(total, 0)
    assert isinstance(stored(tmp_path / "images", tmp_path / "cache").pretrain, TensorImages)  # what is there is used


def build_limited(root, cache, limit, results):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    data = stored(root, cache)
    results.put((data.fingerprint, type(data.pretrain).__name__))


@pytest.mark.parametrize("limit", [1000, 900 * 3 * 32 * 32])
def test_a_disk_that_becomes_full_ends_in_decoding_every_epoch(many, tmp_path, limit):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=build_limited, args=(many, tmp_path / "cache", limit, results))
    process.start()
    found = results.get()
    process.join()
    assert found == (load(many).fingerprint, "LazyImages")
    assert files_of(tmp_path / "cache", ".pixels", ".pt", ".tmp") == []


def test_a_folder_that_cannot_be_written_is_read_or_left_alone(tmp_path, caplog):
    make_folder(tmp_path / "images")
    (tmp_path / "file").write_text("")
    assert isinstance(stored(tmp_path / "images", tmp_path / "file").pretrain, LazyImages)
    assert f"data.cache={tmp_path / 'file'}: cannot be written" in caplog.text
    first = stored(tmp_path / "images", tmp_path / "cache")
    (lock,) = files_of(tmp_path / "cache", ".lock")
    lock.unlink()
    lock.mkdir()  # as in a folder of somebody else, no lock can be taken
    caplog.clear()
    second = stored(tmp_path / "images", tmp_path / "cache")
    assert isinstance(second.pretrain, TensorImages)
    assert_equal(first, second)
    assert not caplog.text


def test_tables_and_shards_are_cached_by_their_files(tmp_path):
    make_both(tmp_path)
    for load_shards, kind in ((parquet, "parquet"), (webdataset, "tar")):
        cache = tmp_path / f"cache of {kind}"
        read = partial(load_shards, str(tmp_path / kind), memory=0, **options(cache=cache))
        first = read()
        assert isinstance(first.pretrain, TensorImages)
        assert_equal(first, read())
        assert len(files_of(cache, ".pixels")) == 1
        held = load_shards(str(tmp_path / kind), **options())
        assert_equal(first, held)
        assert (first.pretrain.blocks is None) == (kind == "tar")
        assert kind == "tar" or torch.equal(first.pretrain.blocks, held.pretrain.blocks)
        file = sorted((tmp_path / kind).iterdir())[0]
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 5))
        read()
        assert len(files_of(cache, ".pixels")) == 2
    write_parquet(tmp_path / "two.parquet", [1, 2, 3, 4], column="other")
    for column in ("image", "other"):
        table = tmp_path / f"{column}.parquet"
        write_parquet(table, range(10), column=column)
        parquet(str(table), image_column=column, memory=0, **options(cache=tmp_path / "columns"))
    assert len(files_of(tmp_path / "columns", ".pixels")) == 2


def test_paths_in_a_table_are_not_cached_since_their_files_may_change(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(9))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"image": ["x.png"] * 4}), tmp_path / "x.parquet")
    read = partial(parquet, str(tmp_path / "x.parquet"), memory=0, read_paths=True)
    assert isinstance(read(**options(cache=tmp_path / "cache")).pretrain, LazyImages)


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "twoview"
    make_folder(tmp_path / "images")
    load(tmp_path / "images", memory=0, cache="auto")
    assert len(files_of(tmp_path / "twoview", ".pixels")) == 1
    for off in (False, "never"):
        assert isinstance(load(tmp_path / "images", memory=0, cache=off).pretrain, LazyImages)
    for other in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert default_folder() == Path.home() / ".cache" / "twoview"


@pytest.mark.parametrize("cache", [True, None, "", " ", 5])
def test_other_values_are_refused(tmp_path, cache):
    with pytest.raises(UserError, match="data.cache=.*: give auto, false or a folder"):
        load(tmp_path, cache=cache)


def test_the_loss_is_the_same_with_and_without_a_cache(tmp_path):
    root = mixed(tmp_path / "images")
    backbone = partial(create_backbone, "test_resnet", image_size=16, stem="small_stride2")
    ways = {"held": {}, "lazy": {"memory": 0}, "built": {"memory": 0, "cache": str(tmp_path / "cache")}}
    ways["hit"] = ways["built"] | {"num_workers": 1}
    for name, changes in ways.items():
        pretrain(tmp_path / name, partial(load, root, **changes), CPU, None, backbone=backbone)
    assert len(losses(tmp_path / "held")) > 1
    assert np.isfinite([float(x) for x in losses(tmp_path / "held")]).all()
    for name in ways:
        assert losses(tmp_path / name) == losses(tmp_path / "held")
