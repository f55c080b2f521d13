"""One picture, whatever its kind, as square uint8."""

import io
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

SUFFIXES = frozenset(Image.registered_extensions()) | {".npy"}


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
    if isinstance(item, str | Path):
        with open(item, "rb") as handle:
            return _square_of_file(handle, size, channels)
    if isinstance(item, bytes):
        return _square_of_file(io.BytesIO(item), size, channels)
    if isinstance(item, Image.Image):
        return _square_of_image(item, size, channels)
    # Tensors are [C, H, W] by convention, also where they are narrower than they have channels.
    array = item.permute(1, 2, 0).numpy() if isinstance(item, Tensor) and item.ndim == 3 else np.asarray(item)
    return _fit(_array(array, channels, last=isinstance(item, Tensor)), size)


_FORMATS = {b"\xff\xd8": ["JPEG"], b"\x89P": ["PNG"]}


def _square_of_file(handle: BinaryIO, size: int, channels: int) -> Tensor:
    begins = handle.read(6)
    handle.seek(0)
    if begins == b"\x93NUMPY":
        return _fit(_array(np.load(handle, allow_pickle=False), channels), size)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's limit is kept
        warnings.filterwarnings("ignore", category=UserWarning)  # of odd metadata
        try:
            # Pillow would ask each of its fifty readers in turn.
            with Image.open(handle, formats=_FORMATS.get(begins[:2])) as image:
                return square(image, size, channels)
        except (OSError, ValueError):
            if begins[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                handle.seek(0)
                return _fit(_array(_read_tiff(handle), channels), size)
            raise


def _square_of_image(image: Image.Image, size: int, channels: int) -> Tensor:
    if image.format == "JPEG" and image.mode == "RGB":
        image.draft("RGB", (size, size))  # lets libjpeg skip what is thrown away anyway
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    turned = image if upright else ImageOps.exif_transpose(image)
    if turned.mode.startswith(("I", "F")):  # 16 bits and more: Pillow's own conversion would clip them to white
        depth = np.float32 if turned.mode == "F" else np.uint16
        return _fit(_array(np.asarray(turned).astype(depth), channels), size)
    if turned.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in turned.info:
        turned = turned.convert("RGBA")
    if turned.mode == "RGBA" and channels != 4:
        white = Image.new("RGBA", turned.size, "white")
        turned = Image.alpha_composite(white, turned)
    if channels not in (1, 3):
        turned = turned if turned.mode in ("RGBA", "CMYK") else turned.convert("RGBA")
        return _fit(_array(np.asarray(turned), channels), size)
    plain = turned.convert("L" if channels == 1 else "RGB")
    short, (width, height) = min(turned.size), turned.size
    left, top = (width - short) // 2, (height - short) // 2
    box = (left, top, left + short, top + short)
    # Pillow's 8-bit resize is that of _fit, several times faster.
    pixels = np.array(plain.crop(box) if short == size else plain.resize((size, size), Image.Resampling.BILINEAR, box))
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1).contiguous()


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
    if pixels.dtype == np.uint16:
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
