import numpy as np
import pytest
import tifffile
import torch
from data.image_files import RNG, gradient, load, make_folder, photo
from PIL import Image

from twoview.data import square


@pytest.mark.parametrize(("height", "width"), [(40, 40), (9, 9), (18, 18), (18, 31), (36, 60)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pillows_resize_of_8_bits_is_that_of_arrays(height, width, channels):
    image = photo(height, width).convert("L" if channels == 1 else "RGB")
    ours, theirs = square(image, 18, channels), square(np.asarray(image), 18, channels)
    assert ours.shape == theirs.shape == (channels, 18, 18)
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_orientation_of_the_camera_is_applied(tmp_path):
    upright = Image.fromarray((gradient() * 255).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    upright.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = square(tmp_path / "turned.jpg", 40, 3)[0].float()
    assert (pixels[-1] - pixels[0]).mean() > 200  # brighter to the right becomes brighter downwards
    assert (pixels[:, -1] - pixels[:, 0]).abs().mean() < 10


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_shows_the_same_image(tmp_path, mode, channels):
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
    frames = [Image.new("RGB", (20, 20), color) for color in ("white", "black")]
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


def test_the_short_side_is_resized_and_the_center_kept(tmp_path):
    wide = np.zeros((50, 150, 3), dtype=np.uint8)
    wide[:, 50:100] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert square(tmp_path / "wide.png", 25, 3).float().mean() > 240
    assert square(tmp_path / "wide.png", 70, 3).shape == (3, 70, 70)


def test_four_bands_of_a_tiff_are_not_rgb_and_full_alpha(tmp_path):
    pixels = RNG.integers(0, 200, (20, 20, 4), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "nir.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    assert torch.equal(square(str(tmp_path / "nir.tif"), 20, 4), torch.from_numpy(pixels).permute(2, 0, 1))


def test_damaged_metadata_do_not_make_an_image_unreadable(tmp_path):
    photo().save(tmp_path / "x.jpg", exif=b"Exif\0\0garbage that is no header")
    assert square(str(tmp_path / "x.jpg"), 18, 3).shape == (3, 18, 18)


def test_whole_numbers_beyond_16_bits_are_broken_not_wrapped(tmp_path):
    make_folder(tmp_path, each=100)
    tifffile.imwrite(tmp_path / "ant" / "deep.tif", np.full((20, 20), 70_000, dtype=np.int32))
    data = load(tmp_path)
    assert [name.endswith("deep.tif") for name, _ in data.broken] == [True]
    assert "give uint8, uint16" in data.broken[0][1]
