"""Images in their order as a Dataset of preprocessed batches, in which unreadable images are listed."""

import copy
import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from twoview.data import Images, LazyImages, Preprocess, TensorImages, whole
from twoview.data.folder import Paths

THUMBNAIL = 96  # largest height and width of a thumbnail in pixels
KEY_BYTES = 16  # size in bytes of the hash of a path, size and time of modification
State = tuple[int, int]  # size of a file in bytes, and time of modification in nanoseconds since 1970


class Decoded(NamedTuple):
    """The n readable images among some positions, ready for the network, and the unreadable ones.

    Attributes:
        pixels: uint8 ``[n, C, S, S]``, see :meth:`twoview.data.Preprocess.decoded`.
        positions: position of each image in the source.
        sizes: original height and width of each image in pixels.
        states: size and time of each file; None for an image that is not in a file of its own.
        thumbnails: JPEG files; empty unless asked for.
        broken: position of each unreadable image, and the reason.
    """

    pixels: Tensor
    positions: list[int]
    sizes: list[tuple[int, int]]
    states: list[State | None]
    thumbnails: list[bytes]
    broken: list[tuple[int, str]]


class Source(Dataset[Decoded]):
    """All images of some splits, one split after the other; indexing by positions returns :class:`Decoded`.

    Args:
        splits: images by name of the split.
        classes: names of the classes, to which the labels of the images refer; empty if they have no names.
        preprocess: preprocessing of the network.
        thumbnails: whether thumbnails are made.
    """

    def __init__(
        self, splits: Mapping[str, Images], classes: Sequence[str], preprocess: Preprocess, thumbnails: bool
    ) -> None:
        self.splits, self.classes, self.thumbnails = list(splits.items()), list(classes), thumbnails
        self.preprocess = copy.deepcopy(preprocess).cpu()  # loader processes have no device
        self.starts = [0, *np.cumsum([len(images) for images in splits.values()]).tolist()]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, positions: Sequence[int] | Tensor) -> Decoded:
        pixels = list[Tensor]()
        found = Decoded(torch.empty(0), [], [], [], [], [])
        for position in torch.as_tensor(positions).tolist():
            state = self.state(position)  # before the file is read: a later change is noticed by an update
            try:
                crop, size, thumbnail = self._decode(position)
            except MemoryError:
                raise
            except Exception as error:
                found.broken.append((position, f"{type(error).__name__}: {error}"))
                continue
            pixels.append(crop)
            found.positions.append(position)
            found.sizes.append(size)
            found.states.append(state)
            found.thumbnails.extend(thumbnail)
        return found._replace(pixels=torch.stack(pixels)) if pixels else found

    @property
    def num_workers(self) -> int:
        """Number of loader processes."""
        return max(images.num_workers for _, images in self.splits)

    @property
    def max_broken(self) -> float:
        """Largest share of the images that may be unreadable."""
        return max((images.max_broken for _, images in self.splits if isinstance(images, LazyImages)), default=0.0)

    def path(self, position: int) -> str:
        """Return the absolute path of an image file, or the name of an image that is not in a file of its own.

        Bytes of a path that are not valid UTF-8 are escaped, since Parquet holds no others.
        """
        split, images, place = self._locate(position)
        name = images.name(place)
        if _file(images, place) is not None:
            name = os.path.abspath(name)
        elif len(self.splits) > 1:
            name = f"{split} {name}"
        return name.encode("utf-8", "backslashreplace").decode()

    def label(self, position: int) -> str | None:
        """Return the name of the class of an image; None if it has no label."""
        _, images, place = self._locate(position)
        label = int(images.labels[place])
        if label < 0:
            return None
        return self.classes[label] if self.classes else str(label)

    def state(self, position: int) -> State | None:
        """Return size and time of a file; None for an image that is not in a file of its own, or cannot be found."""
        _, images, place = self._locate(position)
        file = _file(images, place)
        try:
            status = None if file is None else os.stat(file)
        except (OSError, ValueError):
            return None
        return None if status is None else (status.st_size, status.st_mtime_ns)

    def keys(self) -> np.ndarray:
        """Return the :func:`key` of each image, ``[N]`` of 16 bytes each. No file is opened."""
        keys = (key(self.path(position), self.state(position)) for position in range(len(self)))
        return np.fromiter(keys, dtype=f"S{KEY_BYTES}", count=len(self))

    def fingerprint(self, keys: np.ndarray) -> str:
        """Hash the keys and labels of all images, and the content of images that are not in files of their own."""
        digest = hashlib.blake2b(keys.tobytes() + repr(self.classes).encode(), digest_size=16)
        for _, images in self.splits:
            digest.update(images.labels.numpy().tobytes())
            if isinstance(images, TensorImages):
                digest.update(images.statistics().numpy().tobytes())
            elif not isinstance(images.source, Paths):
                known = getattr(images.source, "fingerprint", None)
                digest.update(repr(known and known()).encode())
        return digest.hexdigest()

    def _locate(self, position: int) -> tuple[str, Images, int]:
        number = bisect_right(self.starts, position) - 1
        return *self.splits[number], position - self.starts[number]

    def _decode(self, position: int) -> tuple[Tensor, tuple[int, int], list[bytes]]:
        _, images, place = self._locate(position)
        channels = images.channels
        if isinstance(images, LazyImages):
            item = images.source[int(images.positions[place])]
            pixels, (height, width, _) = self.preprocess.decoded(item)
        else:
            canvas, _, _, sizes = images[[place]]
            height, width = canvas.shape[2:] if sizes is None else sizes[0].tolist()
            item, pixels = canvas[0, :, :height, :width].cpu(), self.preprocess.crops(canvas.cpu(), sizes)[0]
        thumbnail = [_jpeg(whole(item, THUMBNAIL, channels))] if self.thumbnails else []
        return pixels, (int(height), int(width)), thumbnail


def key(path: str, state: State | None) -> bytes:
    """Hash a path, and the size and time of its file; an image is unchanged if its key is."""
    size, modified = state or (-1, -1)
    return hashlib.blake2b(f"{path}\0{size}\0{modified}".encode(), digest_size=KEY_BYTES).digest()


def _file(images: Images, place: int) -> str | None:
    """Path of the file of an image; None for an image that is not in a file of its own."""
    if isinstance(images, LazyImages) and isinstance(images.source, Paths):
        return str(images.source[int(images.positions[place])])
    return None


def _jpeg(pixels: Tensor) -> bytes:
    """Encode uint8 ``[C, h, w]`` as JPEG; of other numbers of channels than 1 and 3, the first ones are shown."""
    shown = pixels[:3].permute(1, 2, 0).numpy() if len(pixels) >= 3 else pixels[0].numpy()
    file = io.BytesIO()
    Image.fromarray(shown).save(file, "JPEG", quality=80)
    return file.getvalue()
