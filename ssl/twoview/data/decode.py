"""Decoding of one image in any supported form to a uint8 tensor: the whole image, or its center square."""

import io
import math
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
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
_Box = tuple[float, float, float, float]
_FORMATS = {b"\xff\xd8": ["JPEG"], b"\x89P": ["PNG"]}  # Pillow's formats by the first two bytes of the file
# Members of Image.Transpose for the EXIF orientations 2 to 8; orientation 1 is upright.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


class ImageSizeError(ValueError):
    """An array has more bytes than an image may have."""


def luma(pixels: Tensor) -> Tensor:
    """Convert RGB to luma (ITU-R BT.601).

    Args:
        pixels: ``[..., 3, H, W]`` of any dtype and range.

    Returns:
        fp32 ``[..., 1, H, W]`` in the same range.
    """
    return (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3, keepdim=True)


def whole(item: Any, size: int, channels: int) -> Tensor:
    """Decode an image and reduce it, with its aspect ratio, so that its long side has at most ``size`` pixels.

    An image is never enlarged. JPEG files are decoded at a reduced size that is not below the result, which is then
    reached by a resize with antialiasing.

    Args:
        item: an image in one of these forms:

            * path or bytes of an image file, in a format that Pillow reads, as multi-channel TIFF or as ``.npy``;
            * PIL image;
            * array or tensor ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` of uint8, of uint16 (scaled by 1 / 257) or of
              floats in [0, 1].
        size: largest height and width of the result in pixels.
        channels: number of channels of the result: 1 (luma), 3 (RGB; transparent images are blended with white), 4
            (RGBA or CMYK, unchanged), or the number of channels of an array.

    Returns:
        uint8 ``[channels, h, w]`` with h and w in 1 to ``size``.

    Raises:
        OSError, ValueError, SyntaxError, or any other error of Pillow: if the image cannot be decoded, or its dtype,
            range or number of channels is not supported.
    """
    return whole_and_shape(item, size, channels)[0]


def square(item: Any, size: int, channels: int) -> Tensor:
    """Decode an image, resize its short side to ``size`` and crop the center square.

    Args:
        item: an image in any form that :func:`whole` takes.
        size: height and width of the result in pixels.
        channels: number of channels of the result, as for :func:`whole`.

    Returns:
        uint8 ``[channels, size, size]``.

    Raises:
        OSError, ValueError, SyntaxError, or any other error of Pillow: as for :func:`whole`.
    """
    return square_and_shape(item, size, channels)[0]


def whole_and_shape(item: Any, size: int, channels: int) -> tuple[Tensor, Shape]:
    """Decode an image as :func:`whole` does, and also return its original height, width and number of channels."""
    return _decode(item, _Whole(size), channels)


def square_and_shape(item: Any, size: int, channels: int) -> tuple[Tensor, Shape]:
    """Decode an image as :func:`square` does, and also return its original height, width and number of channels."""
    return _decode(item, _Square(size), channels)


def whole_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image after :func:`whole`."""
    scale = min(1.0, size / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True)
class _Whole:
    """The whole image, with a long side of at most ``size``."""

    size: int
    drafted: Sequence[str] = ("RGB", "L")  # modes of JPEG files that are decoded at a reduced size

    def draft(self, height: int, width: int) -> tuple[int, int]:
        """Smallest height and width at which an image may be decoded."""
        return whole_size(height, width, self.size)

    def of_image(self, plain: Image.Image, shape: Shape, box: _Box | None, orientation: int) -> Image.Image:
        """Resize a decoded image of 8 bits and turn it upright.

        Args:
            plain: the image, as it is stored.
            shape: its height and width before it was decoded.
            box: the part of ``plain`` that it covers; None for all.
            orientation: EXIF orientation.
        """
        height, width = whole_size(shape[0], shape[1], self.size)
        if plain.size != (width, height) or box not in (None, (0, 0, width, height)):
            plain = plain.resize((width, height), Image.Resampling.BILINEAR, box)
        return _upright(plain, orientation)

    def of_values(self, values: Tensor) -> Tensor:
        """Resize values fp32 ``[C, H, W]``."""
        new = whole_size(values.shape[1], values.shape[2], self.size)
        return values if new == tuple(values.shape[1:]) else _resized(values, new)


@dataclass(frozen=True)
class _Square:
    """The center square, resized to ``size``; the methods are those of :class:`_Whole`."""

    size: int
    drafted: Sequence[str] = ("RGB",)

    def draft(self, height: int, width: int) -> tuple[int, int]:
        return self.size, self.size

    def of_image(self, plain: Image.Image, shape: Shape, box: _Box | None, orientation: int) -> Image.Image:
        plain = _upright(plain, orientation)
        short, size, (width, height) = min(plain.size), self.size, plain.size
        left, top = (width - short) // 2, (height - short) // 2
        cut = (left, top, left + short, top + short)
        # Pillow's 8-bit resize equals the resize of values up to rounding and is several times faster.
        return plain.crop(cut) if short == size else plain.resize((size, size), Image.Resampling.BILINEAR, cut)

    def of_values(self, values: Tensor) -> Tensor:
        size = self.size
        scale = size / min(values.shape[1:])
        if scale != 1:
            values = _resized(values, tuple(max(size, round(side * scale)) for side in values.shape[1:]))
        top, left = ((side - size) // 2 for side in values.shape[1:])
        return values[:, top : top + size, left : left + size]


_Fit = _Whole | _Square


def _resized(values: Tensor, new: tuple[int, ...]) -> Tensor:
    return F.interpolate(values[None], new, mode="bilinear", antialias=True)[0]


def _decode(item: Any, fit: _Fit, channels: int) -> tuple[Tensor, Shape]:
    if isinstance(item, str | Path):
        with open_regular(item) as handle:
            return _of_file(handle, fit, channels)
    if isinstance(item, bytes):
        return _of_file(io.BytesIO(item), fit, channels)
    if isinstance(item, Image.Image):
        return _of_image(item, fit, channels)
    # Tensors are [C, H, W] by convention, even if W < C.
    array = item.permute(1, 2, 0).numpy() if isinstance(item, Tensor) and item.ndim == 3 else np.asarray(item)
    return _of_array(array, fit, channels, last=isinstance(item, Tensor))


def _of_file(handle: BinaryIO, fit: _Fit, channels: int) -> tuple[Tensor, Shape]:
    begins = handle.read(6)
    handle.seek(0)
    if begins == b"\x93NUMPY":
        _check_npy(handle)
        return _of_array(np.load(handle, allow_pickle=False), fit, channels)
    tiff = begins[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # reject files above Pillow's size limit
        warnings.filterwarnings("ignore", category=UserWarning)  # warnings about malformed metadata
        try:
            with Image.open(handle, formats=_FORMATS.get(begins[:2], FORMATS)) as image:
                if tiff and channels not in (1, 3) and image.mode not in ("RGBA", "CMYK"):
                    raise ValueError(f"mode {image.mode} does not have {channels} channels")  # caught below
                return _of_image(image, fit, channels)
        except (OSError, ValueError):
            if not tiff:
                raise
            handle.seek(0)
            return _of_array(_read_tiff(handle), fit, channels)


def _of_image(image: Image.Image, fit: _Fit, channels: int) -> tuple[Tensor, Shape]:
    shape = (image.height, image.width, len(image.getbands()))
    box: _Box | None = None
    if image.format == "JPEG" and image.mode in fit.drafted:
        height, width = fit.draft(*shape[:2])
        # libjpeg decodes at a reduced size that is not below this one; the last pixels may be covered only in part.
        if 2 * height <= shape[0] and 2 * width <= shape[1]:  # otherwise at its own size
            _, box = image.draft(image.mode, (width, height)) or ("", None)
    orientation, plain = _orientation(image), image
    upright = shape if orientation < 5 else (shape[1], shape[0], shape[2])
    if plain.mode.startswith(("I", "F")):  # Pillow's conversion to 8 bits would clip such values to white
        array = np.asarray(_upright(plain, orientation))
        if plain.mode.startswith("I") and not 0 <= array.min() <= array.max() < 2**16:
            raise ValueError(f"integers from {array.min()} to {array.max()}: give uint16, or floats in [0, 1]")
        array = array if plain.mode == "F" else array.astype(np.uint16)
        return _bytes(fit.of_values(_scaled(array[None], channels))), upright
    if plain.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in plain.info:
        plain = plain.convert("RGBA")
    if plain.mode == "RGBA" and channels != 4:
        plain = Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain)
    if channels not in (1, 3):
        plain = _upright(plain if plain.mode in ("RGBA", "CMYK") else plain.convert("RGBA"), orientation)
        return _bytes(fit.of_values(_scaled(np.asarray(plain).transpose(2, 0, 1), channels))), upright
    plain.load()  # which changes the mode in some formats
    mode = "L" if channels == 1 else "RGB"
    fitted = fit.of_image(plain if plain.mode == mode else plain.convert(mode), shape, box, orientation)
    pixels = np.asarray(fitted).reshape(fitted.height, fitted.width, channels)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), upright


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(Image.Transpose[_TURNS[orientation - 2]])


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 5 to 8 exchange height and width."""
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # an image with damaged metadata is still readable
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _of_array(array: np.ndarray, fit: _Fit, channels: int, last: bool = False) -> tuple[Tensor, Shape]:
    first = _channels_first(array, last)
    shape = (first.shape[1], first.shape[2], len(first))
    plain = first.dtype == np.uint8 and len(first) in (1, 3) and channels in (1, 3)
    if plain and isinstance(fit, _Whole):  # as for a PIL image of the same pixels
        image = Image.fromarray(first[0] if len(first) == 1 else np.ascontiguousarray(first.transpose(1, 2, 0)))
        return _of_image(image, fit, channels)[0], shape
    return _bytes(fit.of_values(_scaled(first, channels))), shape


def _check_size(shape: Sequence[int], dtype: np.dtype) -> None:
    """Refuse an array before it is decoded if it is larger than an image may be."""
    limit = MAX_BYTES_PER_PIXEL * (Image.MAX_IMAGE_PIXELS or math.inf)
    if math.prod(shape) * dtype.itemsize > limit:
        raise ImageSizeError(f"an array of shape {list(shape)} and {dtype} is larger than {limit / 1e6:,.0f} MB")


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


def _channels_first(pixels: np.ndarray, last: bool = False) -> np.ndarray:
    """Return an array of any layout as ``[C, H, W]``; ``last`` means that the channels are last."""
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise ValueError(f"an array of shape {list(pixels.shape)} is not an image")
    return pixels.transpose(2, 0, 1) if last or pixels.shape[2] < min(pixels.shape[:2]) else pixels


def _scaled(pixels: np.ndarray, channels: int) -> Tensor:
    """Convert ``[C, H, W]`` of any depth to fp32 ``[channels, H, W]`` in [0, 255]."""
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


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)
