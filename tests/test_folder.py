import logging
import multiprocessing
import shutil

import numpy as np
import pytest
import tifffile
import torch
from conftest import pretrain
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from twoview import runs
from twoview.data import ImageArrays, Pictures, folder, from_dataset, in_order, square
from twoview.data.folder import Paths
from twoview.errors import UserError
from twoview.evaluate import Protocol

RNG = np.random.default_rng(0)


def photo(height=20, width=28):
    """A smooth random picture, so that JPEG keeps it nearly as it is."""
    small = Image.fromarray(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def make_folder(root, classes=("ant", "bee"), each=12):
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(each):
            image = photo()
            Image.fromarray((np.asarray(image) // 2 + 100 * i).astype(np.uint8)).save(root / name / f"{j}.png")
    return root


def load(root, **changes):
    return folder(str(root), **({"image_size": 16, "batch_size": 4, "num_workers": 0} | changes))


@pytest.mark.parametrize(("height", "width"), [(40, 40), (9, 9), (18, 18), (18, 31), (36, 60)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pillows_resize_of_8_bits_is_that_of_arrays(height, width, channels):
    picture = photo(height, width).convert("L" if channels == 1 else "RGB")
    ours, theirs = square(picture, 18, channels), square(np.asarray(picture), 18, channels)
    assert ours.shape == theirs.shape == (channels, 18, 18)
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_class_folders_give_labels_and_a_fixed_test_split(tmp_path):
    data = load(make_folder(tmp_path))
    assert data.classes == ["ant", "bee"]
    assert (len(data.pretrain), len(data.train), len(data.test)) == (19, 19, 5)
    assert data.pretrain.pixels.shape[1:] == (3, 18, 18)
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
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
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
    (root / "text.jpg").write_text("this is no picture")
    (root / "text.tiff").write_text("this is no picture")
    (root / "text.npy").write_text("this is no picture")
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
    with pytest.raises(UserError, match=r"9 of 22 files cannot be read, more than data.max_broken=0.01"):
        load(tmp_path)


def test_a_folder_of_broken_files_an_empty_one_and_none(tmp_path):
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.jpg").write_text("no")
    with pytest.raises(UserError, match="3 of 3 files cannot be read"):
        load(tmp_path / "broken", max_broken=1.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("no")
    with pytest.raises(UserError, match=r"empty: there are no pictures in this folder \(1 other files\)"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no such folder"):
        load(tmp_path / "missing")
    photo().save(tmp_path / "empty" / "1.png")
    with pytest.raises(UserError, match=r"data.batch_size=4: folder has 1 images"):
        pretrain(
            tmp_path / "run",
            data=lambda: load(tmp_path / "empty"),
            backbone={"name": "test_resnet", "in_chans": 3, "image_size": 16},
        )


def gradient(size=40):
    return np.linspace(0, 1, size)[None, :].repeat(size, 0)


def test_orientation_of_the_camera_is_applied(tmp_path):
    upright = Image.fromarray((gradient() * 255).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = square(tmp_path / "turned.jpg", 40, 3)[0].float()
    assert (pixels[-1] - pixels[0]).mean() > 200  # what grew to the right grows downwards
    assert (pixels[:, -1] - pixels[:, 0]).abs().mean() < 10


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_shows_the_same_picture(tmp_path, mode, channels):
    values = gradient()
    if mode == "I;16":
        image = Image.fromarray((values * 65535).astype(np.uint16))
    else:
        image = Image.fromarray((values * 255).astype(np.uint8)).convert("RGB")
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)  # the palette matters to mode P alone
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    pixels = square(path, 40, channels).float()
    assert pixels.shape == (channels, 40, 40)
    tolerance = 128 if mode == "1" else 12
    assert (pixels - torch.from_numpy(values * 255)).abs().mean() < tolerance
    if mode not in ("1", "P"):
        assert len(pixels[0, 0].unique()) > 30  # 16 bits are scaled, not clipped to white


def test_transparency_is_white_and_kept_as_the_fourth_channel(tmp_path):
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert square(tmp_path / "clear.png", 16, 3).unique().tolist() == [255]
    assert square(tmp_path / "clear.png", 16, 4)[:, 0, 0].tolist() == [200, 0, 0, 0]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert square(tmp_path / "x.gif", 16, 3).unique().tolist() == [255]


@pytest.mark.parametrize("kind", ["npy", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_many_channels_and_depths(tmp_path, kind, dtype):
    values = np.stack([gradient() * (c + 1) / 6 for c in range(6)], 2)
    stored = values.astype(dtype) if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)
    path = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(path, stored)
    else:
        tifffile.imwrite(path, stored, photometric="minisblack", planarconfig="contig")
    pixels = square(path, 40, 6).float()
    assert (pixels - torch.from_numpy(values * 255).permute(2, 0, 1)).abs().max() <= 1
    first = square(np.ascontiguousarray(stored.transpose(2, 0, 1)), 40, 6)
    assert torch.equal(first.float(), pixels)


def test_the_short_side_is_resized_and_the_centre_kept(tmp_path):
    wide = np.zeros((50, 150, 3), dtype=np.uint8)
    wide[:, 50:100] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert square(tmp_path / "wide.png", 25, 3).float().mean() > 240
    assert square(tmp_path / "wide.png", 70, 3).shape == (3, 70, 70)


def test_what_does_not_fit_is_decoded_as_what_does(tmp_path):
    make_folder(tmp_path)
    held, streamed = load(tmp_path), load(tmp_path, memory=0)
    assert isinstance(held.pretrain, ImageArrays)
    assert isinstance(streamed.pretrain, Pictures)
    for a, b in ((held.pretrain, streamed.pretrain), (held.test, streamed.test)):
        whole = next(iter(in_order(b)))
        assert torch.equal(whole.pixels, a.pixels)
        assert torch.equal(whole.labels, a.labels)
        assert torch.equal(b.subset(torch.tensor([3, 1]))[[0, 1]].pixels, a.pixels[[3, 1]])
    assert held.mean_std == streamed.mean_std


def test_a_file_that_breaks_during_the_run_is_replaced(tmp_path, caplog):
    make_folder(tmp_path)
    data = load(tmp_path, memory=0)
    victim = data.pretrain.source[int(data.pretrain.positions[2])]
    (tmp_path / victim).write_bytes(b"")
    assert torch.equal(data.pretrain[[2]].pixels, data.pretrain[[3]].pixels)
    assert victim in caplog.text
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError, match="is the disk still there"):
        data.pretrain[[0]]


def test_spawned_workers(tmp_path):
    make_folder(tmp_path)
    data = load(tmp_path, memory=0)
    loader = DataLoader(
        data.pretrain,
        batch_size=None,
        sampler=list(torch.arange(19).split(8)),
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context("spawn"),
    )
    pixels = torch.cat([batch.pixels for batch in loader])
    assert torch.equal(pixels, next(iter(in_order(data.pretrain))).pixels)


def test_paths_are_one_blob():
    names = ["a", "", "é/日本", "x" * 300]
    paths = Paths(names)
    assert [paths[i] for i in range(len(paths))] == names


@pytest.mark.parametrize("memory", [None, 0])
def test_a_folder_trains_and_is_judged(tmp_path, memory):
    make_folder(tmp_path / "pictures", each=40)
    (tmp_path / "pictures" / "ant" / "broken.png").write_text("no")
    report = pretrain(
        tmp_path / "run",
        data=lambda: load(tmp_path / "pictures", memory=memory, batch_size=16, max_broken=0.1),
        backbone={"name": "test_resnet", "in_chans": 3, "image_size": 16},
        protocol=Protocol(l2=(1e-2,), k=(1,)),
    )
    assert report["results"]["trained"]["linear"]["test_top1"] > 0.8
    assert "broken.png" in (tmp_path / "run" / "broken.txt").read_text()
    from twoview import load as load_checkpoint

    backbone, preprocess = load_checkpoint(tmp_path / "run")
    path = tmp_path / "pictures" / "bee" / "3.png"
    with Image.open(path) as image:
        features = backbone(preprocess(image))
    assert torch.allclose(features, backbone(preprocess(square(path, 18, 3))), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_channels_end_with_a_probe(tmp_path, channels):
    for i, name in enumerate(("ant", "bee")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for j in range(20):
            noise = RNG.integers(0, 30000, (20, 20, channels)) + 30000 * i
            np.save(tmp_path / "data" / name / f"{j}.npy", noise.astype(np.uint16))
    report = pretrain(
        tmp_path / "run",
        data=lambda: load(tmp_path / "data", channels=channels, batch_size=16),
        backbone={"name": "test_resnet", "in_chans": channels, "image_size": 16},
        protocol=Protocol(l2=(1e-2,), k=(1,), baselines=False),
    )
    assert report["results"]["trained"]["linear"]["test_top1"] > 0.8


def test_without_labels_there_is_training_and_no_evaluation(tmp_path):
    for i in range(20):
        photo().save(tmp_path / f"{i}.jpg")
    arguments = {"backbone": {"name": "test_resnet", "in_chans": 3, "image_size": 16}}
    report = pretrain(tmp_path / "run", data=lambda: load(tmp_path), **arguments)
    assert "results" not in report
    assert report["training"]["images_seen"] == 40
    assert "val/effective_rank" in (tmp_path / "run" / "metrics.csv").read_text()
    with pytest.raises(UserError, match="has no labels"):
        runs.linear_probe(tmp_path / "run", lambda **_: load(tmp_path), run_dir=tmp_path / "probe")


class Own(Dataset):
    """A user's own Dataset of PIL images and labels."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return Image.new("RGB", (24, 20), (100 * (i % 2), 50, i % 50)), i % 2


def test_anyones_own_dataset(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    report = pretrain(
        tmp_path,
        data=lambda: from_dataset(Own(40), image_size=16, batch_size=16, test=Own(10)),
        backbone={"name": "test_resnet", "in_chans": 3, "image_size": 16},
        protocol=Protocol(l2=(1e-2,), k=(1,), baselines=False),
    )
    assert report["results"]["trained"]["knn"]["test_top1"] == 1
    backbone = {"name": "test_resnet", "in_chans": 3, "image_size": 16}
    assert "results" not in pretrain(tmp_path / "bare", data=Own(600), backbone=backbone)


@pytest.mark.parametrize("memory", [None, 0])
def test_loader_processes_check_many_pictures_as_one_process_does(tmp_path, memory):
    (tmp_path / "all").mkdir()
    for i in range(1100):
        Image.new("L", (12, 12), i % 251).save(tmp_path / "all" / f"{i:04d}.png")
    (tmp_path / "all" / "0500.png").write_bytes(b"")
    alone, helped = (load(tmp_path, num_workers=n, memory=memory, channels=1, image_size=8) for n in (0, 2))
    assert len(alone.pretrain) == len(helped.pretrain) == 1099
    assert alone.broken == helped.broken
    assert alone.mean_std == helped.mean_std
    assert alone.fingerprint == helped.fingerprint
    assert torch.equal(alone.pretrain[[0, 499, 500, 1098]].pixels, helped.pretrain[[0, 499, 500, 1098]].pixels)


def test_the_preflight_says_in_words_what_there_is_and_what_it_does(tmp_path, caplog):
    make_folder(tmp_path)
    Image.new("L", (50, 10)).save(tmp_path / "ant" / "wide.png")
    (tmp_path / "bee" / "broken.jpg").write_bytes(b"no picture")
    with caplog.at_level(logging.INFO):
        load(tmp_path, max_broken=0.1)
    assert (
        "has 25 pictures (25 .png), 10 to 20 x28 to 50 pixels high and wide, 1 or 3 channels, 2 classes; 1 broken"
        in (caplog.text)
    )
    assert "short sides are resized to 18 pixels, the centre squares kept" in caplog.text
    assert "the network sees 16x16 of them" in caplog.text


def test_albums_are_no_classes_of_flowers(tmp_path, caplog):
    albums = make_folder(tmp_path / "albums", ("2019", "2020"))
    flowers = make_folder(tmp_path / "flowers", ("rose", "tulip"))
    data = load(albums, eval_root=str(flowers))
    assert "none in common, so data.root is taken as unlabelled" in caplog.text
    assert data.classes == ["rose", "tulip"]
    assert (len(data.pretrain), len(data.train), len(data.test)) == (24, 19, 5)
    make_folder(tmp_path / "more", ("rose", "lily"))
    data = load(flowers, eval_root=str(tmp_path / "more"))
    assert "no picture of data.root is of lily" in caplog.text


def test_folders_of_splits_are_no_classes(tmp_path):
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


def test_whole_numbers_beyond_16_bits_are_broken_not_wrapped(tmp_path):
    make_folder(tmp_path, each=100)
    tifffile.imwrite(tmp_path / "ant" / "deep.tif", np.full((20, 20), 70_000, dtype=np.int32))
    data = load(tmp_path)
    assert [name.endswith("deep.tif") for name, _ in data.broken] == [True]
    assert "give uint8, uint16" in data.broken[0][1]


def test_four_bands_of_a_tiff_are_not_rgb_and_full_alpha(tmp_path):
    pixels = RNG.integers(0, 200, (20, 20, 4), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "nir.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    assert torch.equal(square(str(tmp_path / "nir.tif"), 20, 4), torch.from_numpy(pixels).permute(2, 0, 1))


def test_damaged_metadata_make_no_picture_unreadable(tmp_path):
    photo().save(tmp_path / "x.jpg", exif=b"Exif\0\0garbage that is no header")
    assert square(str(tmp_path / "x.jpg"), 18, 3).shape == (3, 18, 18)


def test_a_dataset_that_is_already_normalised_is_a_sentence():
    class Normalised(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return torch.randn(3, 20, 20), i

    with pytest.raises(UserError, match="the first item of Normalised is no picture.*not normalised"):
        from_dataset(Normalised(), image_size=16)
