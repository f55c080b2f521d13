"""Images in WebDataset tar shards."""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, BinaryIO

import numpy as np

from twoview.data.decode import SUFFIXES
from twoview.data.disk_cache import files_fingerprint
from twoview.data.image_data import ImageData
from twoview.data.splits import LoadSettings, Places, Split, find_shards, load_splits
from twoview.errors import UserError, require
from twoview.files import open_regular


class TarImages(Sequence[bytes]):
    """Encoded images in uncompressed tar files, read in place.

    Args:
        files: the shards.
        where: int64 ``[N, 3]``: for each image, the index of its shard, the offset of its first byte, and its size in
            bytes.
    """

    def __init__(self, files: list[str], where: np.ndarray) -> None:
        self.files, self.where = files, where

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, position: Any) -> Any:
        shard, first, size = (int(number) for number in self.where[position])
        # Open the shard for each image: forked workers would share the offset of an open file, and an open file cannot
        # be pickled for spawned workers.
        with open(self.files[shard], "rb") as handle:
            handle.seek(first)
            return handle.read(size)

    def name(self, position: int) -> str:
        """Return the shard and offset of the image at a position, for messages."""
        return f"{self.files[int(self.where[position][0])]}, byte {int(self.where[position][1])}"

    def fingerprint(self) -> str:
        """Hash of the paths, sizes and times of modification of the shards, and of the places of the images."""
        return files_fingerprint(self.files, self.where.tobytes())


def webdataset(root: Places, eval_root: Places | None = None, **options: Any) -> ImageData:
    """Load images from WebDataset tar shards on local disks.

    The headers of the shards are read once. Images are then read in place, in any order, so that each epoch shuffles
    all images. The label of a sample is the content of its ``.cls`` file, or the value of "label" or "cls" in its
    ``.json`` file. A sample without these has no label.

    Args:
        root: a file, a folder with the ``.tar`` files of one split, a glob pattern such as ``shards/train-*.tar``, or a
            list of these.
        eval_root: labeled test images, in the same forms as ``root``. None holds out a fifth of the labeled images.
        options: fields of :class:`twoview.data.splits.LoadSettings`.

    Raises:
        UserError: if there are no images, a shard is compressed or damaged, or too many images are unreadable.
    """
    return load_splits(_read_index, root, eval_root, "webdataset", LoadSettings(**options))


def _read_index(root: Places, knob: str) -> Split:
    files = find_shards(root, knob, (".tar", ".tgz", ".tar.gz"))
    where, names = [], []
    for number, file in enumerate(files):
        try:
            with open_regular(file) as handle, tarfile.open(fileobj=handle, mode="r:") as shard:
                for image, name in _samples(shard):
                    where.append((number, image.offset_data, image.size))
                    names.append(name)
                _check_end(shard, handle)
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
            raise UserError(
                f"{knob}: {file} cannot be read as an uncompressed tar file ({error}); unpack, repair or remove it"
            ) from error
    require(where, f"{knob}: there are no images in {', '.join(files[:3])}")
    return Split(TarImages(files, np.array(where, dtype=np.int64)), names)


def _samples(shard: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """Yield images with their labels; the files of a sample are adjacent and share the name up to the first dot."""

    def sample(member: tarfile.TarInfo) -> tuple[str, str]:
        folder, name = os.path.split(member.name)
        return folder, name.partition(".")[0]

    for _, members in groupby(filter(tarfile.TarInfo.isfile, shard), sample):
        image, label = None, None
        for member in members:
            extension = os.path.basename(member.name).partition(".")[2]
            if f".{extension.lower()}" in SUFFIXES:
                image = image or member
            elif extension in ("cls", "json"):
                text = shard.extractfile(member).read().decode("utf-8", "replace").strip()  # type: ignore[union-attr]
                label = (text if text not in ("", "-1") else None) if extension == "cls" else label or _json_label(text)
        if image is not None:
            yield image, label


def _check_end(shard: tarfile.TarFile, handle: BinaryIO) -> None:
    """Refuse a shard with more content than was read: tarfile ends at a damaged header as at the end of the archive."""
    handle.seek(shard.offset)
    end = handle.read()
    if len(end) < tarfile.BLOCKSIZE or any(end):
        what = "a damaged header, or further content" if any(end) else "the file is incomplete"
        raise tarfile.ReadError(f"{what} at byte {shard.offset}")


def _json_label(text: str) -> str | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    label = content.get("label", content.get("cls")) if isinstance(content, dict) else None
    known = (isinstance(label, str) and label) or (isinstance(label, int) and label >= 0)
    return str(label) if known else None
