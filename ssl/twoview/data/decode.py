"""One picture, whatever its kind, as square uint8."""

import io
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional as F

# What Pillow reads itself: no video, no documents that need another program.
_KINDS = {kind for kind in Image.registered_extensions().values() if kind in Image.OPEN} - {"EPS", "MPEG", "WMF"}
_STUBS = {"BUFR", "GRIB", "HDF5"}
SUFFIXES = frozenset(s for s, kind in Image.registered_extensions().items() if kind in _KINDS - _STUBS) | {".npy"}


Shape = tuple[int, int, int]


def square(item: Any, size: int, channels: int) -> Tensor:
    """A picture with its short side resized to ``size`` and its centre square cut out.

    Args:
        item: path or bytes of a picture (any format of Pillow's, multi-channel TIFF, or ``.npy``), a PIL image, or an
            array or tensor ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` of uint8, uint16 (scaled by 1/257) or floats in
            [0, 1].
        size: height and width in pixels.
        channels: 1 (luma), 3 (RGB; alpha over white), 4 (RGBA or CMYK as it is), or those of an array.

    Returns:
        uint8 ``[channels, size, size]``.

    Raises:
        OSError, ValueError, SyntaxError, or whatever else Pillow raises: a file that is broken, or no picture.
    """
    return square_and_shape(item, size, channels)[0]


def square_and_shape(item: Any, size: int, channels: int) -> tuple[Tensor, Shape]:
    """What :func:`square` gives, and the height, width and channels that the picture had."""
    if isinstance(item, str | Path):
        with open(item, "rb") as handle:
            return _square_of_file(handle, size, channels)
    if isinstance(item, bytes):
        return _square_of_file(io.BytesIO(item), size, channels)
    if isinstance(item, Image.Image):
        return _square_of_image(item, size, channels)
    # Tensors are [C, H, W] by convention, also where they are narrower than they have channels.
    array = item.permute(1, 2, 0).numpy() if isinstance(item, Tensor) and item.ndim == 3 else np.asarray(item)
    return _square_of_array(array, size, channels, last=isinstance(item, Tensor))


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FORMATS = {b"\xff\xd8": ["JPEG"], b"\x89P": ["PNG"]}


def _square_of_file(handle: BinaryIO, size: int, channels: int) -> tuple[Tensor, Shape]:
    begins = handle.read(6)
    handle.seek(0)
    if begins == b"\x93NUMPY":
        return _square_of_array(np.load(handle, allow_pickle=False), size, channels)
    tiff = begins[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's limit is kept
        warnings.filterwarnings("ignore", category=UserWarning)  # of odd metadata
        try:
            # Pillow would ask each of its fifty readers in turn.
            with Image.open(handle, formats=_FORMATS.get(begins[:2])) as image:
                if tiff and channels not in (1, 3) and image.mode not in ("RGBA", "CMYK"):
                    raise ValueError(f"{image.mode} has not {channels} channels")  # or Pillow does not see them
                return _square_of_image(image, size, channels)
        except (OSError, ValueError):
            if not tiff:
                raise
            handle.seek(0)
            return _square_of_array(_read_tiff(handle), size, channels)


def _square_of_image(image: Image.Image, size: int, channels: int) -> tuple[Tensor, Shape]:
    shape = (image.height, image.width, len(image.getbands()))
    if image.format == "JPEG" and image.mode == "RGB":
        image.draft("RGB", (size, size))  # lets libjpeg skip what is thrown away anyway
    turn = _TURNS.get(_orientation(image))
    turned = image if turn is None else image.transpose(turn)
    if turned.mode.startswith(("I", "F")):  # 16 bits and more: Pillow's own conversion would clip them to white
        values = np.asarray(turned)
        if turned.mode.startswith("I") and not 0 <= values.min() <= values.max() < 2**16:
            raise ValueError(f"whole numbers from {values.min()} to {values.max()}: give uint16, or floats in [0, 1]")
        return _fit(_array(values if turned.mode == "F" else values.astype(np.uint16), channels), size), shape
    if turned.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in turned.info:
        turned = turned.convert("RGBA")
    if turned.mode == "RGBA" and channels != 4:
        white = Image.new("RGBA", turned.size, "white")
        turned = Image.alpha_composite(white, turned)
    if channels not in (1, 3):
        turned = turned if turned.mode in ("RGBA", "CMYK") else turned.convert("RGBA")
        return _fit(_array(np.asarray(turned), channels), size), shape
    plain = turned.convert("L" if channels == 1 else "RGB")
    short, (width, height) = min(turned.size), turned.size
    left, top = (width - short) // 2, (height - short) // 2
    box = (left, top, left + short, top + short)
    # Pillow's 8-bit resize is that of _fit, several times faster.
    pixels = np.array(plain.crop(box) if short == size else plain.resize((size, size), Image.Resampling.BILINEAR, box))
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1).contiguous(), shape


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata make no picture unreadable
        return 1


def _square_of_array(array: np.ndarray, size: int, channels: int, last: bool = False) -> tuple[Tensor, Shape]:
    values = _array(array, channels, last)
    return _fit(values, size), (values.shape[1], values.shape[2], array.size // (values.shape[1] * values.shape[2]))


def _read_tiff(handle: BinaryIO) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        raise ValueError('TIFF with many channels needs: pip install "twoview[tiff]"') from None
    try:
        pixels: np.ndarray = tifffile.imread(handle)
    except Exception as error:  # tifffile raises errors of its own
        raise ValueError(f"broken TIFF ({error})") from error
    return pixels


def _array(pixels: np.ndarray, channels: int, last: bool = False) -> Tensor:
    """Array of any layout and depth as float ``[C, H, W]`` in [0, 255]; ``last`` says that C is known to be last."""
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim != 3:
        raise ValueError(f"an array of shape {list(pixels.shape)} is no picture")
    elif last or pixels.shape[2] < min(pixels.shape[:2]):
        pixels = pixels.transpose(2, 0, 1)
    values: np.ndarray
    if pixels.dtype.newbyteorder("=") == np.uint16:
        values = pixels.astype(np.float32) / 257
    elif pixels.dtype == np.uint8:
        values = pixels.astype(np.float32)
    elif (
        np.issubdtype(pixels.dtype, np.floating)
        and np.isfinite(pixels).all()
        and 0 <= pixels.min() <= pixels.max() <= 1
    ):
        values = pixels.astype(np.float32) * 255
    else:
        raise ValueError(f"{pixels.dtype} pixels: give uint8, uint16, or floats in [0, 1]")
    tensor = torch.from_numpy(values)
    if len(tensor) == 1 and channels == 3:
        tensor = tensor.expand(3, -1, -1)
    if len(tensor) == 3 and channels == 1:
        tensor = (tensor * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    if len(tensor) != channels:
        raise ValueError(f"{len(tensor)} channels, not data.channels={channels}")
    return tensor


def _fit(values: Tensor, size: int) -> Tensor:
    height, width = values.shape[1:]
    scale = size / min(height, width)
    if scale != 1:
        new = (max(size, round(height * scale)), max(size, round(width * scale)))
        values = F.interpolate(values[None], new, mode="bilinear", antialias=True)[0]
        height, width = new
    top, left = (height - size) // 2, (width - size) // 2
    return values[:, top : top + size, left : left + size].round().clamp(0, 255).to(torch.uint8)
