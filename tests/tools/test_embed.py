"""Embedding of images to a Parquet file: content, interruption, updates, several processes, and what is refused."""

import io
import multiprocessing
import os
import re
import signal
import time
from functools import partial

import numpy as np
import pyarrow.parquet
import pytest
import torch
from data.image_files import photo, write_parquet
from hostile_runs import run
from PIL import Image
from sklearn.decomposition import PCA
from two_ranks import on_two_ranks

import twoview
from twoview.data import TensorImages, digits, folder, parquet
from twoview.errors import UserError
from twoview.tools import embed, embedding_parts, read_embeddings

SIZE = 16


@pytest.fixture(scope="session")
def encoder():
    return twoview.load("random:test_resnet", image_size=SIZE)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """40 photographs of two classes and of different sizes, one of them turned by EXIF."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(40):
        file = root / ("ant", "bee ö")[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        photo(20 + i, 28).save(file)
    exif = Image.Exif()
    exif[274] = 6
    photo(20, 28).save(root / "ant" / "turned.jpg", exif=exif)
    return root


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(embedding_parts, "PART", 8)


def listed(root, **changes):
    """The images as the command line lists them."""
    knobs = {"image_size": SIZE, "num_workers": 0, "batch_size": 4, "listed": True}
    return folder(str(root), **knobs | changes)


def table(path):
    return pyarrow.parquet.read_table(path)


def opened(file):
    with Image.open(file) as image:
        image.load()
        return image


def copied(pictures, root):
    for file in pictures.rglob("*.*"):
        target = root / file.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return root


def test_a_row_for_each_image_with_the_features_of_the_encoder(encoder, pictures, tmp_path, small_parts):
    to = tmp_path / "new folder" / "a.parquet"
    done = embed(encoder, listed(pictures), to)
    assert (done.images, done.reused, done.broken) == (41, 0, [])
    found, files = table(to), sorted(pictures.rglob("*.*"))
    assert found["path"].to_pylist() == [str(file) for file in files]
    assert found["index"].to_pylist() == list(range(41))
    assert found["label"].to_pylist() == [file.parent.name for file in files]
    assert found["height"].to_pylist() == [28 if f.suffix == ".jpg" else opened(f).height for f in files]
    assert found["width"].to_pylist() == [20 if f.suffix == ".jpg" else 28 for f in files]
    assert found["modified"].to_pylist() == [file.stat().st_mtime_ns for file in files]
    read = read_embeddings(to)
    expected = torch.cat([encoder(opened(file)) for file in files])
    assert torch.allclose(read.vectors, expected, atol=1e-5)
    assert read.metadata["checkpoint"] == twoview.torch_files.hash_tensors(encoder.network.state_dict())
    assert twoview.ModelCard(**read.metadata["card"]).backbone == encoder.card.backbone
    assert pyarrow.parquet.ParquetFile(to).num_row_groups == 6
    assert [file.name for file in to.parent.iterdir()] == ["a.parquet"]


def test_precision_names_without_utf8_and_unlabelled_images(encoder, tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    name = os.fsencode(root) + b"/caf\xe9.png"
    photo().save(os.fsdecode(name))
    embed(encoder, listed(root), tmp_path / "a.parquet", precision="fp16")
    found = table(tmp_path / "a.parquet")
    assert found["path"].to_pylist() == [f"{root}/caf\\udce9.png"]
    assert found["label"].to_pylist() == [None]
    assert str(found["vector"].type.value_type) == "halffloat"
    read = read_embeddings(tmp_path / "a.parquet")
    assert torch.equal(read.vectors, encoder(opened(os.fsdecode(name))).half().float())
    again = embed(encoder, listed(root), tmp_path / "a.parquet", precision="fp16", update=True)
    assert again.images == 1


def test_images_that_are_not_in_files_of_their_own(encoder, tmp_path):
    write_parquet(tmp_path / "in.parquet", [3, 1, 2, b"damaged"], labels=[0, 1, -1, 0])
    data = parquet(str(tmp_path / "in.parquet"), listed=True, num_workers=0, image_size=SIZE, max_broken=0.5)
    done = embed(encoder, data, tmp_path / "a.parquet")
    assert done.images == 3
    assert done.broken[0][0].endswith("in.parquet, row 3 of row group 0")
    found = table(tmp_path / "a.parquet")
    assert found["label"].to_pylist() == ["ant", "bee", None]
    assert found["bytes"].null_count == 3
    gray = twoview.load("random:test_resnet", image_size=SIZE, channels=1)
    embed(gray, partial(digits, batch_size=512), tmp_path / "digits.parquet")
    images = digits(image_size=SIZE)
    read = read_embeddings(tmp_path / "digits.parquet")
    assert read.paths[1347] == "test image 0"
    expected = gray.feature_matrix(images.test)
    assert torch.allclose(read.vectors[1347:], expected, atol=1e-5)
    plain = TensorImages(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([7, -1]))
    embed(gray, plain, tmp_path / "plain.parquet")
    assert read_embeddings(tmp_path / "plain.parquet").labels == ["7", None]


def test_columns_for_a_map(encoder, pictures, tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr("twoview.tools.embedding_columns.map_kind", lambda: "PCA")
    embed(encoder, listed(pictures), tmp_path / "a.parquet", columns=["neighbors", "xy", "thumbnail"])
    found = table(tmp_path / "a.parquet")
    vectors = np.stack(found["vector"].to_numpy())
    first = Image.open(io.BytesIO(found["thumbnail"][0].as_py()))
    assert (first.format, first.size) == ("JPEG", (28, 20))
    original = np.asarray(opened(found["path"][0].as_py()).convert("RGB"))
    assert np.abs(np.asarray(first).astype(int) - original).mean() < 10 < original.std()
    points, expected = np.stack([found["x"], found["y"]], 1), PCA(2).fit_transform(vectors)
    assert np.abs(points * np.sign((points * expected).sum(0)) - expected).max() < 1e-3
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distances = 1 - unit @ unit.T
    np.fill_diagonal(distances, np.inf)
    for row, neighbors in enumerate(found["neighbors"].to_pylist()):
        assert len(neighbors["ids"]) == 10
        assert row not in neighbors["ids"]
        assert np.allclose(neighbors["distances"], np.sort(distances[row])[:10], atol=1e-5)
        assert np.allclose(distances[row, neighbors["ids"]], neighbors["distances"], atol=1e-5)
    single = tmp_path / "one"
    single.mkdir()
    photo().save(single / "a.png")
    embed(encoder, listed(single), tmp_path / "one.parquet", columns=["xy", "neighbors"])
    assert table(tmp_path / "one.parquet")["neighbors"].to_pylist() == [{"ids": [], "distances": []}]


def _killed(function, parts, at_least):
    """Run a function in a forked process, and kill it once there are so many parts."""
    process = multiprocessing.get_context("fork").Process(target=function, daemon=True)
    process.start()
    end = time.monotonic() + 60
    while len(list(parts.glob("*-*.parquet"))) < at_least and process.is_alive() and time.monotonic() < end:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


def test_a_killed_run_is_resumed_without_a_row_lost_or_doubled(encoder, pictures, tmp_path, small_parts):
    (tmp_path / "b").mkdir()
    embed(encoder, listed(pictures), tmp_path / "a.parquet", columns=["xy"])
    to, killed = tmp_path / "b" / "b.parquet", 0
    parts, times = tmp_path / "b" / "b.parquet.parts", {}
    for at_least in range(6):
        code = _killed(lambda: embed(encoder, listed(pictures), to, columns=["xy"]), parts, at_least)
        killed += code == -signal.SIGKILL
        if at_least == 3:
            with pytest.raises(UserError, match=r"unfinished run with other settings \(precision was fp32, is fp16\)"):
                embed(encoder, listed(pictures), to, columns=["xy"], precision="fp16", update=True)
            with pytest.raises(UserError, match=r"\(images were added, removed or changed; images was 41, is 20\)"):
                embed(encoder, listed(pictures / "bee ö"), to, columns=["xy"])
        now = {file: file.stat().st_mtime_ns for file in parts.glob("*-*.parquet")}
        assert times.items() <= now.items() or to.exists()  # finished parts are not computed again
        times = now
    embed(encoder, listed(pictures), to, columns=["xy"])
    assert killed > 2
    assert to.read_bytes() == (tmp_path / "a.parquet").read_bytes()
    assert [file.name for file in to.parent.iterdir()] == ["b.parquet"]


def test_a_damaged_part_is_computed_again_and_files_of_others_stay(encoder, pictures, tmp_path, small_parts):
    to = tmp_path / "a.parquet"
    with pytest.raises(UserError, match="data.max_broken"):
        embed(encoder, listed(_with_broken(pictures, tmp_path)), to)
    parts = sorted((tmp_path / "a.parquet.parts").glob("*-*.parquet"))
    content = bytearray(parts[0].read_bytes())
    content[len(content) // 2] ^= 255
    parts[0].write_bytes(content)
    (parts[0].parent / "mine.parquet").write_bytes(b"")
    done = embed(encoder, listed(tmp_path / "photos", max_broken=0.5), to)
    assert done.images == 41
    assert [file.name for file in parts[0].parent.iterdir()] == ["mine.parquet"]
    expected = table_of(encoder, pictures, tmp_path)
    assert table(to)["vector"].equals(expected["vector"])


def _with_broken(pictures, tmp_path):
    root = copied(pictures, tmp_path / "photos")
    (root / "bee ö" / "zz.png").write_bytes(b"not an image")
    return root


def table_of(encoder, root, tmp_path):
    embed(encoder, listed(root), tmp_path / "whole.parquet")
    return table(tmp_path / "whole.parquet")


def test_broken_images_are_named_and_have_no_row(encoder, pictures, tmp_path, small_parts, caplog):
    caplog.set_level("INFO")
    root, to = _with_broken(pictures, tmp_path), tmp_path / "a.parquet"
    with pytest.raises(UserError, match=r"1 of 42 images.*zz.png \(UnidentifiedImageError.*max_broken=0.01"):
        embed(encoder, listed(root), to)
    done = embed(encoder, listed(root, max_broken=0.1), to)
    assert [path for path, _ in done.broken] == [str(root / "bee ö" / "zz.png")]
    assert table(to)["index"].to_pylist() == list(range(41))
    assert "unreadable images, which have no row: 1" in caplog.text
    assert f"broken: {root / 'bee ö' / 'zz.png'}" in caplog.text
    assert read_embeddings(to).metadata["broken"]["count"] == 1
    for file in root.rglob("*.*"):
        file.write_bytes(b"not an image")
    with pytest.raises(UserError, match="42 of 42 images"):
        embed(encoder, listed(root, max_broken=1.0), tmp_path / "b.parquet")


def test_an_update_computes_what_is_new_or_changed_and_drops_what_is_gone(encoder, pictures, tmp_path, small_parts):
    root, to = copied(pictures, tmp_path / "photos"), tmp_path / "a.parquet"
    embed(encoder, listed(root), to)
    before = dict(zip(table(to)["path"].to_pylist(), read_embeddings(to).vectors, strict=True))
    photo().save(root / "ant" / "000 new.png")
    photo(50, 60).save(root / "ant" / "02.png")
    (root / "ant" / "04.png").unlink()
    unnoticed = root / "ant" / "06.png"  # neither size nor time tell that it has changed: the former vector stays
    status = unnoticed.stat()
    unnoticed.write_bytes(unnoticed.read_bytes()[:-12] + bytes(12))
    os.utime(unnoticed, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"exists, with other content \(images were added, .*update=true"):
        embed(encoder, listed(root), to)
    code = _killed(lambda: embed(encoder, listed(root), to, update=True), tmp_path / "a.parquet.parts", 2)
    assert code == -signal.SIGKILL
    (root / "ant" / "08.png").unlink()  # while the update is interrupted
    done = embed(encoder, listed(root), to, update=True)
    assert done.images == 40
    assert done.reused in (38, 39, 40)  # what the killed update has computed is taken over too
    fresh = table_of(encoder, root, tmp_path)
    after = table(to)
    assert after.drop_columns("vector").equals(fresh.drop_columns("vector"))
    vectors = dict(zip(after["path"].to_pylist(), read_embeddings(to).vectors, strict=True))
    assert torch.equal(vectors[str(unnoticed)], before[str(unnoticed)])
    expected = dict(zip(fresh["path"].to_pylist(), read_embeddings(tmp_path / "whole.parquet").vectors, strict=True))
    assert all(torch.allclose(vectors[path], expected[path], atol=1e-5) for path in vectors if path != str(unnoticed))
    assert not torch.allclose(vectors[str(root / "ant" / "02.png")], before[str(root / "ant" / "02.png")], atol=1e-5)
    assert embed(encoder, listed(root), to).images == 40  # complete: nothing is done
    with_thumbnails = embed(encoder, listed(root), to, update=True, columns=["thumbnail"])
    assert with_thumbnails.reused == 0


def test_what_does_not_fit_is_refused_before_anything_is_computed(encoder, pictures, tmp_path, small_parts):
    to = tmp_path / "a.parquet"
    embed(encoder, listed(pictures), to)
    content = to.read_bytes()
    other = encoder.at_random(5)
    for update in (False, True):
        with pytest.raises(UserError, match=r"checkpoint was \w+, is \w+\)"):
            embed(other, listed(pictures), to, update=update)
        with pytest.raises(UserError, match=r"\(precision was fp32, is fp16\).*rerun=true"):
            embed(encoder, listed(pictures), to, precision="fp16", update=update)
    with pytest.raises(UserError, match="batch_size was 4, is 5"):
        embed(encoder, listed(pictures, batch_size=5), to)
    assert to.read_bytes() == content
    assert not (tmp_path / "a.parquet.parts").exists()
    embed(other, listed(pictures), to, rerun=True)
    assert not torch.allclose(read_embeddings(to).vectors, torch.zeros(()))
    assert to.read_bytes() != content
    to.write_bytes(b"something else")
    with pytest.raises(UserError, match="to=.*cannot be read as Parquet"):
        embed(encoder, listed(pictures), to)
    for knobs, message in (
        ({"columns": ["thumbnails"]}, "columns=thumbnails: choose among thumbnail, xy, neighbors"),
        ({"precision": "bf16"}, "precision=bf16: choose one of fp32, fp16"),
        ({"devices": 0}, "trainer.devices=0"),
        ({"update": True, "rerun": True}, "update=true rerun=true"),
        ({"to": tmp_path / "a.csv"}, "ends in .parquet"),
    ):
        with pytest.raises(UserError, match=message):
            embed(encoder, listed(pictures), **{"to": to} | knobs)
    with pytest.raises(UserError, match="the images have 1 channels"):
        embed(encoder, digits(image_size=SIZE), to)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Hardtanh(-3e5, 3e5))
    large = twoview.Encoder(network, encoder.card)
    large.preprocess.std.fill_(1e-6)
    with pytest.raises(
        UserError, match=r"precision=fp16: [1-9]\d* images have features that are not finite .*precision=fp32"
    ):
        embed(large, listed(pictures), tmp_path / "b.parquet", precision="fp16")


def test_processes_of_torchrun_write_the_same_file(encoder, pictures, tmp_path, small_parts):
    data, to = listed(pictures), tmp_path / "b.parquet"
    embed(encoder, data, tmp_path / "a.parquet")

    def each(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        return embed(encoder, data, to).images

    assert sorted(on_two_ranks(each, 60)) == [0, 41]
    assert to.read_bytes() == (tmp_path / "a.parquet").read_bytes()


def test_the_command_line_starts_several_processes_and_writes_the_same_file(encoder, pictures, tmp_path):
    embed(encoder, listed(pictures), tmp_path / "a.parquet", columns=["thumbnail"])
    knobs = ["checkpoint=random:test_resnet", f"data.root={pictures}", f"data.image_size={SIZE}", "data.batch_size=4"]
    more = ["to=b.parquet", "columns=[thumbnail]", "trainer.devices=2", "data.num_workers=0"]
    done = run(tmp_path, "task=embed", "data=folder", *knobs, *more, limit=120)
    assert done.code == 0, done.err
    assert (tmp_path / "b.parquet").read_bytes() == (tmp_path / "a.parquet").read_bytes()
    assert re.search(r"embed: 41 of 41 images, [\d,]+ images/s", done.out), done.out
