"""Decoding of one image in any supported form to a square uint8 tensor."""

import io
import math
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional as F

from twoview.files import open_regular

# Formats that Pillow may try. Among those left out are EPS and WMF, which Pillow decodes by starting other programs.
Image.init()
_ORDINARY = "AVIF BMP CUR DDS DIB GIF ICNS ICO IM JPEG JPEG2000 MPO PCX PNG PPM PSD QOI SGI TGA TIFF WEBP XBM XPM"
FORMATS = tuple(kind for kind in _ORDINARY.split() if kind in Image.OPEN)
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in _ORDINARY.split()} | {".npy"}
# Compressions of TIFF that tifffile may decode: none, LZW, JPEG, PackBits, and deflate, whose size is checked before.
_DEFLATE, _BOUNDED = (8, 32946), (1, 5, 7, 8, 32773, 32946)
MAX_BYTES_PER_PIXEL = 8  # of arrays, whose size is limited to this times Pillow's limit on pixels
Shape = tuple[int, int, int]
_FORMATS = {b"\xff\xd8": ["JPEG"], b"\x89P": ["PNG"]}  # Pillow's formats by the first two bytes of the file
# Members of Image.Transpose for the EXIF orientations 2 to 8; orientation 1 is upright.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


def luma(pixels: Tensor) -> Tensor:
    """Convert RGB to luma (ITU-R BT.601).

    Args:
        pixels: ``[..., 3, H, W]`` of any dtype and range.

    Returns:
        fp32 ``[..., 1, H, W]`` in the same range.
    """
    return (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3, keepdim=True)


def square(item: Any, size: int, channels: int) -> Tensor:
    """Decode an image, resize its short side to ``size`` and crop the center square.

    Args:
        item: an image in one of these forms:

            * path or bytes of an image file, in a format that Pillow reads, as multi-channel TIFF or as ``.npy``;
            * PIL image;
            * array or tensor ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` of uint8, of uint16 (scaled by 1 / 257) or of
              floats in [0, 1].
        size: height and width of the result in pixels.
        channels: number of channels of the result: 1 (luma), 3 (RGB; transparent images are blended with white), 4
            (RGBA or CMYK, unchanged), or the number of channels of an array.

    Returns:
        uint8 ``[channels, size, size]``.

    Raises:
        OSError, ValueError, SyntaxError, or any other error of Pillow: if the image cannot be decoded, or its dtype,
            range or number of channels is not supported.
    """
    return square_and_shape(item, size, channels)[0]


def square_and_shape(item: Any, size: int, channels: int) -> tuple[Tensor, Shape]:
    """Decode an image as :func:`square` does, and also return its original height, width and number of channels."""
    if isinstance(item, str | Path):
        with open_regular(item) as handle:
            return _square_of_file(handle, size, channels)
    if isinstance(item, bytes):
        return _square_of_file(io.BytesIO(item), size, channels)
    if isinstance(item, Image.Image):
        return _square_of_image(item, size, channels)
    # Tensors are [C, H, W] by convention, even if W < C.
    array = item.permute(1, 2, 0).numpy() if isinstance(item, Tensor) and item.ndim == 3 else np.asarray(item)
    return _square_of_array(array, size, channels, last=isinstance(item, Tensor))


def _square_of_file(handle: BinaryIO, size: int, channels: int) -> tuple[Tensor, Shape]:
    begins = handle.read(6)
    handle.seek(0)
    if begins == b"\x93NUMPY":
        _check_npy(handle)
        return _square_of_array(np.load(handle, allow_pickle=False), size, channels)
    tiff = begins[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # reject files above Pillow's size limit
        warnings.filterwarnings("ignore", category=UserWarning)  # warnings about malformed metadata
        try:
            with Image.open(handle, formats=_FORMATS.get(begins[:2], FORMATS)) as image:
                if tiff and channels not in (1, 3) and image.mode not in ("RGBA", "CMYK"):
                    raise ValueError(f"mode {image.mode} does not have {channels} channels")  # caught below
                return _square_of_image(image, size, channels)
        except (OSError, ValueError):
            if not tiff:
                raise
            handle.seek(0)
            return _square_of_array(_read_tiff(handle), size, channels)


def _square_of_image(image: Image.Image, size: int, channels: int) -> tuple[Tensor, Shape]:
    shape = (image.height, image.width, len(image.getbands()))
    if image.format == "JPEG" and image.mode == "RGB":
        image.draft("RGB", (size, size))  # libjpeg decodes at a reduced size
    turned = _turn_upright(image)
    if turned.mode.startswith(("I", "F")):  # Pillow's conversion to 8 bits would clip such values to white
        values = np.asarray(turned)
        if turned.mode.startswith("I") and not 0 <= values.min() <= values.max() < 2**16:
            raise ValueError(f"integers from {values.min()} to {values.max()}: give uint16, or floats in [0, 1]")
        return _fit(_array(values if turned.mode == "F" else values.astype(np.uint16), channels), size), shape
    if turned.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in turned.info:
        turned = turned.convert("RGBA")
    if turned.mode == "RGBA" and channels != 4:
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
    if channels not in (1, 3):
        turned = turned if turned.mode in ("RGBA", "CMYK") else turned.convert("RGBA")
        return _fit(_array(np.asarray(turned), channels), size), shape
    plain = turned.convert("L" if channels == 1 else "RGB")
    short, (width, height) = min(turned.size), turned.size
    left, top = (width - short) // 2, (height - short) // 2
    box = (left, top, left + short, top + short)
    # Pillow's 8-bit resize equals the resize in _fit up to rounding and is several times faster.
    pixels = np.array(plain.crop(box) if short == size else plain.resize((size, size), Image.Resampling.BILINEAR, box))
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1).contiguous(), shape


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # an image with damaged metadata is still readable
        orientation = 1
    return image.transpose(Image.Transpose[_TURNS[orientation - 2]]) if 2 <= orientation <= 8 else image


def _square_of_array(array: np.ndarray, size: int, channels: int, last: bool = False) -> tuple[Tensor, Shape]:
    values = _array(array, channels, last)
    return _fit(values, size), (values.shape[1], values.shape[2], array.size // (values.shape[1] * values.shape[2]))


def _check_size(shape: Sequence[int], dtype: np.dtype) -> None:
    """Refuse an array before it is decoded if it is larger than an image may be."""
    limit = MAX_BYTES_PER_PIXEL * (Image.MAX_IMAGE_PIXELS or math.inf)
    if math.prod(shape) * dtype.itemsize > limit:
        raise ValueError(f"an array of shape {list(shape)} and {dtype} is larger than {limit / 1e6:,.0f} MB")


def _check_inflated(handle: BinaryIO, offsets: Sequence[int], sizes: Sequence[int]) -> None:
    """Refuse segments of a TIFF that inflate to more than an image may have: tifffile inflates without a limit."""
    place, total = handle.tell(), 0
    for offset, size in zip(offsets, sizes, strict=False):
        handle.seek(offset)
        packed, inflate = handle.read(size), zlib.decompressobj()
        while packed:
            total += len(inflate.decompress(packed, 2**24))
            _check_size((total,), np.dtype(np.uint8))
            packed = inflate.unconsumed_tail
    handle.seek(place)


def _check_npy(handle: BinaryIO) -> None:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(handle)
    if version not in readers:
        raise ValueError(f"version {version} of .npy files is for arrays that are not images")
    shape, _, dtype = readers[version](handle)
    _check_size(shape, dtype)
    handle.seek(0)


def _read_tiff(handle: BinaryIO) -> np.ndarray:
    try:
        import tifffile

        with tifffile.TiffFile(handle) as file:
            series = file.series[0]
            page = series.keyframe
            for shape in (series.shape, page.chunks):  # of the image, and of the parts that are decoded
                _check_size(shape, series.dtype)
            if page.compression not in _BOUNDED:
                raise ValueError(f"TIFF compression {page.compression} is not supported for this number of channels")
            for inner in series.pages:
                if page.compression in _DEFLATE and inner is not None:
                    _check_inflated(handle, inner.dataoffsets, inner.databytecounts)
            return np.asarray(series.asarray())
    except ImportError:
        raise ValueError('TIFF with many channels needs: pip install "twoview[tiff]"') from None
    except Exception as error:  # tifffile raises its own exception classes
        raise ValueError(f"damaged TIFF ({error})") from error


def _array(pixels: np.ndarray, channels: int, last: bool = False) -> Tensor:
    """Convert an array of any layout and depth to float ``[C, H, W]`` in [0, 255]; ``last`` means channels last."""
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim != 3:
        raise ValueError(f"an array of shape {list(pixels.shape)} is not an image")
    elif last or pixels.shape[2] < min(pixels.shape[:2]):
        pixels = pixels.transpose(2, 0, 1)
    values: np.ndarray
    if pixels.dtype.newbyteorder("=") == np.uint16:
        values = pixels.astype(np.float32) / 257
    elif pixels.dtype == np.uint8:
        values = pixels.astype(np.float32)
    elif np.issubdtype(pixels.dtype, np.floating) and 0 <= pixels.min() <= pixels.max() <= 1:
        values = pixels.astype(np.float32) * 255
    else:
        raise ValueError(f"{pixels.dtype} pixels: give uint8, uint16, or floats in [0, 1]")
    tensor = torch.from_numpy(values)
    if len(tensor) == 1 and channels == 3:
        tensor = tensor.expand(3, -1, -1)
    if len(tensor) == 3 and channels == 1:
        tensor = luma(tensor)
    if len(tensor) != channels:
        raise ValueError(f"{len(tensor)} channels instead of data.channels={channels}")
    return tensor


def _fit(values: Tensor, size: int) -> Tensor:
    scale = size / min(values.shape[1:])
    if scale != 1:
        new = [max(size, round(side * scale)) for side in values.shape[1:]]
        values = F.interpolate(values[None], new, mode="bilinear", antialias=True)[0]
    top, left = ((side - size) // 2 for side in values.shape[1:])
    return values[:, top : top + size, left : left + size].round().clamp(0, 255).to(torch.uint8)
