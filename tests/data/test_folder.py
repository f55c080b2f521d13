import logging

import numpy as np
import pytest
import torch
from data.image_files import load, make_folder, photo
from PIL import Image

from twoview.data import folder
from twoview.data.folder import Paths
from twoview.errors import UserError


def test_class_folders_give_labels_and_a_fixed_test_split(tmp_path):
    data = load(make_folder(tmp_path))
    assert data.classes == ["ant", "bee"]
    assert (len(data.pretrain), len(data.train), len(data.test)) == (19, 19, 5)
    assert data.pretrain.pixels.shape[1:] == (3, 28, 28)  # 20 by 28 pixels, below the limit of twice 16
    assert data.pretrain.sizes.tolist() == [[20, 28]] * 19
    assert data.image_size == 16
    again = load(tmp_path)
    assert torch.equal(data.test.pixels, again.test.pixels)
    known = {p.numpy().tobytes() for p in data.test.pixels}
    assert not known & {p.numpy().tobytes() for p in data.pretrain.pixels}


def test_an_eval_root_is_the_test(tmp_path):
    train, test = make_folder(tmp_path / "train"), make_folder(tmp_path / "test", each=3)
    data = load(train, eval_root=str(test))
    assert (len(data.pretrain), len(data.train), len(data.test)) == (24, 24, 6)
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_an_unlabelled_root_with_a_labelled_eval_root(tmp_path):
    test = make_folder(tmp_path / "test")
    (tmp_path / "flat").mkdir()
    for i in range(8):
        photo().save(tmp_path / "flat" / f"{i}.jpg")
    data = load(tmp_path / "flat", eval_root=str(test))
    assert (len(data.pretrain), len(data.train), len(data.test)) == (8, 19, 5)
    assert (data.pretrain.labels == -1).all()


def test_any_nesting_and_any_name_without_labels(tmp_path):
    deep = tmp_path / "Fotos für Oma" / "été (1)" / "it's, a=b"
    deep.mkdir(parents=True)
    for i, name in enumerate(["ä b.jpg", "日本.png", "UPPER.JPG", "x.webp", "y.bmp"]):
        photo().save(deep / name, **({"lossless": True} if i == 3 else {}))
    photo().save(tmp_path / "top.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    data = load(tmp_path)
    assert len(data.pretrain) == 6
    assert data.train is None
    assert data.test is None


def test_lists_of_folders_and_of_files(tmp_path):
    a, b = make_folder(tmp_path / "a", each=6), make_folder(tmp_path / "b", classes=("bee", "cat"), each=6)
    data = folder([str(a), str(b)], image_size=16, batch_size=4, num_workers=0)
    assert data.classes == ["ant", "bee", "cat"]
    (tmp_path / "list.txt").write_text("".join(f"a/ant/{i}.png\n" for i in range(6)))
    assert len(load(tmp_path / "list.txt").pretrain) == 6
    rows = [f'"a/ant/{i}.png",x' for i in range(6)] + [f"a/bee/{i}.png,y" for i in range(6)]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    assert load(tmp_path / "list.csv").classes == ["x", "y"]
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="the first line must name the columns"):
        load(tmp_path / "bad.csv")


def break_files(root):
    whole = (root / "ok.png").read_bytes()
    (root / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("this is no image")
    (root / "text.tiff").write_text("this is no image")
    (root / "text.npy").write_text("this is no image")
    np.save(root / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(root / "counts.npy", np.full((20, 20), 7, dtype=np.int64))
    np.save(root / "four.npy", np.zeros((20, 20, 4), dtype=np.uint8))


def test_broken_files_are_skipped_counted_and_listed(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    for i in range(12):
        photo().save(tmp_path / f"{i}.png")
    photo().save(tmp_path / "ok.png")
    Image.new("RGB", (400, 400)).save(tmp_path / "bomb.png")
    break_files(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399 * 400)
    data = load(tmp_path, max_broken=0.5)
    assert len(data.pretrain) == 13
    broken = {name.rsplit("/", 1)[1] for name, _ in data.broken}
    assert broken == {
        *("truncated.png", "empty.jpg", "text.jpg", "text.tiff", "text.npy", "object.npy", "counts.npy", "four.npy"),
        "bomb.png",
    }
    assert "9 broken files" in caplog.text
    with pytest.raises(UserError, match=r"9 of 22 files cannot be read .*raise data.max_broken=0.01"):
        load(tmp_path)


def test_a_folder_of_broken_files_an_empty_one_and_none(tmp_path):
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.jpg").write_text("no")
    with pytest.raises(UserError, match="3 of 3 files cannot be read"):
        load(tmp_path / "broken", max_broken=1.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("no")
    with pytest.raises(UserError, match=r"empty: there are no images in this folder \(1 other files\)"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no such folder"):
        load(tmp_path / "missing")


def test_paths_are_one_blob():
    names = ["a", "", "é/日本", "x" * 300]
    paths = Paths(names)
    assert [paths[i] for i in range(len(paths))] == names


def test_the_log_says_what_was_found_and_how_it_is_stored(tmp_path, caplog):
    make_folder(tmp_path)
    Image.new("L", (50, 10)).save(tmp_path / "ant" / "wide.png")
    (tmp_path / "bee" / "broken.jpg").write_bytes(b"no image")
    with caplog.at_level(logging.INFO):
        load(tmp_path, max_broken=0.1)
    sizes = "10 to 20 pixels high and 28 to 50 wide, 1 or 3 channels"
    assert f"has 25 images (25 .png), {sizes}, 2 classes; 1 broken files" in caplog.text
    assert "long sides are reduced to 32 pixels, canvases have 32 pixels (0 MB), held in memory" in caplog.text
    assert "network input: 16 pixels" in caplog.text


def test_labels_of_other_classes_than_those_of_the_test_are_ignored(tmp_path, caplog):
    albums = make_folder(tmp_path / "albums", ("2019", "2020"))
    flowers = make_folder(tmp_path / "flowers", ("rose", "tulip"))
    data = load(albums, eval_root=str(flowers))
    assert "share no class, so data.root is taken as unlabelled" in caplog.text
    assert data.classes == ["rose", "tulip"]
    assert (len(data.pretrain), len(data.train), len(data.test)) == (24, 19, 5)
    make_folder(tmp_path / "more", ("rose", "lily"))
    data = load(flowers, eval_root=str(tmp_path / "more"))
    assert "data.root has no images of the test classes lily" in caplog.text


def test_folders_of_splits_are_not_classes(tmp_path):
    make_folder(tmp_path, ("train", "val"))
    with pytest.raises(UserError, match="holds the splits train and val, not classes; give data.root="):
        load(tmp_path)


def test_links_hidden_folders_and_lists_as_spreadsheets_save_them(tmp_path):
    real = make_folder(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("ant", "bee"):
        (linked / name).symlink_to(real / name)
    (linked / "ant" / "circle").symlink_to(linked)
    (linked / ".thumbnails").mkdir()
    photo().save(linked / ".thumbnails" / "x.png")
    assert load(linked).classes == ["ant", "bee"]
    lines = ["Path, Label", *(f"real/{n}/{j}.png, {n}" for n in ("ant", "bee") for j in range(8))]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    assert load(tmp_path / "list.csv").classes == ["ant", "bee"]
