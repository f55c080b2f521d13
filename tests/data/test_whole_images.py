"""Whole images: decoding with the aspect kept, canvases, statistics, and the preprocessing of the evaluation."""

import io
import os

import numpy as np
import pytest
import torch
from data.image_files import load, make_folder, photo
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset

from twoview.data import LazyImages, Preprocess, TensorImages, center_squares, from_dataset, in_order, whole
from twoview.data.canvases import GrowingCanvases, Storage, image_statistics, on_canvases
from twoview.data.disk_cache import _storage
from twoview.errors import UserError

# Height and width of an image, and those of the whole image of at most 32 pixels.
SIZES = {
    "landscape": ((60, 90), (21, 32)),
    "portrait": ((90, 60), (32, 21)),
    "square": ((64, 64), (32, 32)),
    "as large as allowed": ((32, 20), (32, 20)),
    "tiny": ((3, 5), (3, 5)),
    "one pixel": ((1, 1), (1, 1)),
    "panorama": ((40, 800), (2, 32)),
    "line": ((1, 5000), (1, 32)),
}


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def ramp(height, width):
    """Brighter to the right and downwards; a shift by a pixel of the result is seen, another filter is not."""
    rows, columns = np.linspace(0, 120, height)[:, None], np.linspace(0, 120, width)[None]
    return Image.fromarray((rows + columns).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_aspect_is_kept_and_nothing_is_enlarged(tmp_path, name, channels):
    (height, width), expected = SIZES[name]
    image = photo(height, width)
    image.save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", np.asarray(image.convert("RGBA" if channels == 4 else "RGB")))
    forms = [image, tmp_path / "x.png", (tmp_path / "x.png").read_bytes()]
    if (height, width) not in ((3, 5), (1, 1), (1, 5000)):  # arrays with fewer pixels than channels are ambiguous
        forms.append(tmp_path / "x.npy")
    for form in forms:
        pixels = whole(form, 32, channels)
        assert pixels.dtype == torch.uint8
        assert tuple(pixels.shape) == (channels, *expected)
        assert (pixels.int() - whole(image, 32, channels).int()).abs().max() <= 1  # Pillow rounds in between
    if max(height, width) <= 32 and channels == 3:
        assert torch.equal(whole(image, 32, 3), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_six_channels_keep_their_aspect_too(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 2**16, (50, 100, 6), dtype=np.uint16))
    assert whole(tmp_path / "x.npy", 32, 6).shape == (6, 16, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_before_the_aspect_is_kept(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.zeros((201, 302, 3), dtype=np.uint8)
    upright[:100, :150] = 255  # upper left
    expected = (21, 32) if orientation < 5 else (32, 21)
    pixels = whole(jpeg(Image.fromarray(upright), exif=exif), 32, 3)[0].float()
    assert tuple(pixels.shape) == expected
    corners = [pixels[0, 0], pixels[0, -1], pixels[-1, -1], pixels[-1, 0]]  # clockwise
    assert int(torch.stack(corners).argmax()) == (orientation - 1) % 4


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_never_decoded_below_the_size_of_the_result(mode):
    reduced = 0
    for height, width in [(33, 33), (63, 65), (100, 99), (129, 257), (301, 200), (512, 40), (64, 1000), (31, 20)]:
        for size in (8, 16, 31, 32, 33, 64):
            file = jpeg(ramp(height, width).convert(mode), quality=95)
            with Image.open(io.BytesIO(file)) as image:
                pixels = whole(image, size, len(mode))
                assert image.height >= pixels.shape[1], (height, width, size)  # the size at which it was decoded
                assert image.width >= pixels.shape[2], (height, width, size)
                reduced += image.size != (width, height)
            with Image.open(io.BytesIO(file)) as image:
                image.load()  # at its full size
                difference = (whole(image, size, len(mode)).float() - pixels.float()).abs()
            assert difference.max() < 12, (height, width, size)
            assert difference.mean() < 2, (height, width, size)
    assert reduced > 10


def test_canvases_hold_the_images_in_their_corner():
    images = [torch.full((2, h, w), 7, dtype=torch.uint8) for h, w in ((2, 3), (4, 1))]
    pixels, sizes = on_canvases(images, 2, 4)
    assert sizes.tolist() == [[2, 3], [4, 1]]
    assert pixels.shape == (2, 2, 4, 4)
    assert pixels.sum((1, 2, 3)).tolist() == [2 * 6 * 7, 2 * 4 * 7]
    assert pixels[0, :, :2, :3].unique().tolist() == [7]
    assert on_canvases([], 2, 4)[1].shape == (0, 2)


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("order", ["ascending", "descending", "random", "equal"])
def test_growing_canvases_are_those_made_with_the_size_known(tmp_path, in_file, order, monkeypatch):
    monkeypatch.setattr("twoview.data.canvases.PART_BYTES", 3000)  # several parts
    generator = np.random.default_rng(0)
    sides = {"equal": [9] * 40, "random": generator.integers(1, 40, 40)}.get(order, np.linspace(1, 39, 40).astype(int))
    chunks = []
    for side in reversed(sides) if order == "descending" else sides:
        images = [torch.from_numpy(generator.integers(0, 256, (2, side, w), dtype=np.uint8)) for w in (1, side)]
        chunks.append((images, int(side)))
    with open(tmp_path / "x", "w+b") as file:
        flat = torch.full((2 * 80 * 64**2,), 99, dtype=torch.uint8)
        canvases = GrowingCanvases(_storage(file.fileno()) if in_file else Storage.in_memory(flat), 2, 64)
        for images, side in chunks:
            canvases.add(on_canvases(images, 2, side)[0])
        side = canvases.finish()
        size = canvases.count * 2 * side * side
        found = torch.from_numpy(np.fromfile(tmp_path / "x", dtype=np.uint8)[:size]) if in_file else flat[:size]
        written = os.fstat(file.fileno()).st_size
    assert side == max(sides)
    expected = on_canvases([image for images, _ in chunks for image in images], 2, side)[0]
    assert torch.equal(found.view(-1, 2, side, side), expected)
    if in_file:
        assert written <= canvases.count * 2 * (side * 5 // 4) ** 2


def mixed(root):
    """Class folders with images of many aspects."""
    make_folder(root, each=6)
    for i, ((height, width), _) in enumerate(SIZES.values()):
        photo(height, width).save(root / "ant" / f"mixed{i}.png")
        photo(width, height).save(root / "bee" / f"mixed{i}.jpg")
    return root


@pytest.mark.parametrize("memory", [None, 0])
def test_a_folder_of_all_aspects(tmp_path, memory):
    data = load(mixed(tmp_path), memory=memory)
    for split in (data.pretrain, data.test):
        for batch in in_order(split, 5):
            assert batch.pixels.shape[1:] == (3, 32, 32)
            for position, canvas, (height, width) in zip(batch.ids, batch.pixels, batch.sizes, strict=True):
                expected = whole(split.name(int(position)), 32, 3)
                assert torch.equal(canvas[:, :height, :width], expected)
                assert int(canvas.sum()) == int(expected.sum())  # zero beside the image


def test_mean_and_deviation_are_those_of_the_images_not_of_their_canvases(tmp_path):
    data = load(mixed(tmp_path))
    images = [whole(data.pretrain.name(i), 32, 3).double() / 255 for i in range(len(data.pretrain))]
    mean = torch.stack([image.mean((1, 2)) for image in images]).mean(0)
    square = torch.stack([image.square().mean((1, 2)) for image in images]).mean(0)
    assert data.mean_std[0] == pytest.approx(mean.tolist(), abs=1e-6)
    assert data.mean_std[1] == pytest.approx((square - mean**2).sqrt().tolist(), abs=1e-6)


def test_fingerprints_tell_images_of_other_shapes_apart():
    labels = torch.zeros(1, dtype=torch.long)
    found = set()
    for height, width in ((4, 8), (8, 4), (8, 8), (2, 8)):
        pixels, sizes = on_canvases([torch.full((1, height, width), 100, dtype=torch.uint8)], 1, 8)
        found.add(TensorImages(pixels, labels, sizes=sizes).statistics().numpy().tobytes())
    turned = torch.arange(32, dtype=torch.uint8).view(1, 4, 8)
    for image in (turned, turned.flip(1), turned.flip(2)):
        pixels, sizes = on_canvases([image], 1, 8)
        found.add(image_statistics(pixels, sizes).numpy().tobytes())
    # Constant images of 4x8 and 8x4 have the same number of equal pixels.
    assert len(found) == 3 + 3


def test_images_that_fill_their_canvases_need_no_sizes(tmp_path):
    make_folder(tmp_path)
    for file in tmp_path.rglob("*.png"):
        photo(50, 50).save(file)
    held, lazy = load(tmp_path), load(tmp_path, memory=0, max_broken=0.1)
    for data in (held, lazy):
        batch = data.pretrain[[0, 1]]
        assert (batch.sizes, batch.pixels.shape[2:]) == (None, (32, 32))
    photo(20, 50).save(lazy.pretrain.name(0))
    assert int(lazy.pretrain[[0]].ids) != 0  # replaced like a broken file, since its size would not be known
    assert held.fingerprint == lazy.fingerprint


class Items(Dataset):
    """A user's own Dataset of images of all aspects."""

    images = [photo(h, w) for (h, w), _ in SIZES.values()]  # noqa: RUF012

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], i % 2


def test_a_users_own_dataset_gives_whole_images():
    data = from_dataset(Items(), image_size=16, batch_size=4)
    batch = data.pretrain[range(8)]
    assert batch.sizes.tolist() == [list(expected) for _, expected in SIZES.values()]
    assert (data.store_size, data.resize_size) == (32, 18)


def test_center_squares_are_cropped_from_the_true_image():
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for _, (h, w) in SIZES.values()]
    pixels, sizes = on_canvases(images, 3, 32)
    found = center_squares(pixels, sizes, 18)
    for image, square in zip(images, found, strict=True):
        height, width = image.shape[1:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        cut = image[None, :, top : top + side, left : left + side].float()
        expected = F.interpolate(cut, (18, 18), mode="bilinear", antialias=True)[0].round().clamp(0, 255)
        assert torch.equal(square.float(), expected)
    assert torch.equal(center_squares(pixels, torch.full((8, 2), 32), 18), center_squares(pixels, None, 18))
    assert center_squares(pixels[:0], sizes[:0], 18).shape == (0, 3, 18, 18)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_photograph_and_its_stored_canvas_give_equal_pixels(tmp_path, channels):
    files = []
    for i, ((height, width), _) in enumerate([*SIZES.values()] * 2):
        files.append(tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}")
        photo(height, width).save(files[-1])
    lazy = LazyImages(files, torch.zeros(len(files), dtype=torch.long), 32, channels)
    batch = lazy[range(len(files))]
    preprocess = Preprocess(16, [0.4] * channels, [0.2] * channels, store_size=32, resize_size=18)
    stored = preprocess(batch.pixels, batch.sizes)
    assert stored.shape == (len(files), channels, 16, 16)
    for file, expected in zip(files, stored, strict=True):
        with Image.open(file) as image:
            assert torch.equal(preprocess(image)[0], expected), file
        if file.suffix == ".png" and channels == 3:
            tensor = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
            assert torch.equal(preprocess(tensor)[0], expected), file


def test_a_crop_that_is_larger_than_its_square_is_refused():
    with pytest.raises(UserError, match="resize_size=15: must be at least image_size=16"):
        Preprocess(16, [0.5], [0.5], 32, 15)


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        (torch.int32, (4, 2), r"sizes must be int64 \[4, 2\]"),
        (torch.int64, (3, 2), r"sizes must be int64 \[4, 2\]"),
        (torch.int64, (4,), r"sizes must be int64 \[4, 2\]"),
    ],
)
def test_wrong_sizes_are_refused(dtype, shape, message):
    pixels, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UserError, match=message):
        TensorImages(pixels, labels, sizes=torch.ones(shape, dtype=dtype))
    for size in (0, 9):
        with pytest.raises(UserError, match="sizes must lie in 1 to 8"):
            TensorImages(pixels, labels, sizes=torch.full((4, 2), size))


def test_statistics_of_images_of_different_sizes_are_those_of_each_image():
    sizes = torch.tensor([[5, 3], [2, 8], [5, 3], [8, 8], [1, 1]])
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes.tolist()]
    found = image_statistics(*on_canvases(images, 3, 8))
    assert torch.equal(found, torch.cat([image_statistics(image[None]) for image in images]))
    torch.testing.assert_close(found[:, 0], torch.stack([image.double().mean((1, 2)) / 255 for image in images]))
    assert image_statistics(*on_canvases([], 3, 8)).shape == (0, 3, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_of_an_image_do_not_depend_on_the_images_beside_it(channels):
    pixels = torch.randint(0, 256, (3, channels, 300, 300), dtype=torch.uint8)
    found = image_statistics(pixels)
    assert torch.equal(found, image_statistics(pixels, torch.full((3, 2), 300)))
    for image, known in zip(pixels, found, strict=True):
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                assert torch.equal(image_statistics(image[None])[0], known)
            finally:
                torch.set_num_threads(before)
