"""Size of an image from the header of its file."""

import warnings
from pathlib import Path

from PIL import Image

from twoview.data.decode import FORMATS
from twoview.files import open_regular


def file_size(path: str | Path) -> tuple[int, int] | None:
    """Read height and width of an image file from its header, without decoding it.

    Args:
        path: path of the file.

    Returns:
        Height and width in pixels as they are stored, before an EXIF orientation is applied; None if there is no such
        file, or Pillow does not read it.
    """
    try:
        with open_regular(path) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes and metadata; no pixels are decoded
            with Image.open(handle, formats=FORMATS) as image:
                return image.height, image.width
    except Exception:  # Pillow raises exceptions of many classes for damaged files
        return None
