"""Groups of images that show the same thing, such as near-duplicates, from a file."""

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from twoview.data.folder import read_list
from twoview.data.images import Images
from twoview.errors import require

log = logging.getLogger(__name__)


def read_groups(file: str | Path, images: Images, knob: str = "method.group_file") -> Tensor:
    """Read the group of each image.

    Args:
        file: a ``.csv`` file with the columns ``path`` and ``group``. A path is relative to the folder of the file, or
            it is the name of an image as :meth:`twoview.data.TensorImages.name` returns it. Rows without a group and
            images without a row are allowed.
        images: N images.
        knob: knob that named the file, for messages.

    Returns:
        int64 ``[N]``, number of the group of each image; -1 for images without a group.

    Raises:
        UserError: if the file cannot be read, or names none of the images.
    """
    where = Path(str(file)).expanduser()
    require(where.suffix.lower() == ".csv" and where.is_file(), f"{knob}={file}: there is no such .csv file")
    paths, groups = read_list(where, knob, column="group")
    require(any(groups), f"{knob}={file}: the column group is missing or empty")
    number = {group: place for place, group in enumerate(dict.fromkeys(group for group in groups if group))}
    group_of = {os.path.abspath(path): number[group] for path, group in zip(paths, groups, strict=True) if group}
    # Names that are no paths are relative to the folder of the file as well.
    names = [images.name(position) for position in range(len(images))]
    places = [(os.path.abspath(name), os.path.abspath(where.parent / name)) for name in names]
    found = [next((group_of[place] for place in both if place in group_of), -1) for both in places]
    grouped = sum(group >= 0 for group in found)
    require(grouped, f"{knob}={file}: names none of the {len(images)} images; a path must be relative to that file")
    log.info("%s: %d of %d images are in %d groups", file, grouped, len(images), len(number))
    return torch.tensor(found)
