"""Load images from one or two places, and divide them into the splits of a run."""

import glob
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from twoview.data.disk_cache import DiskCache, default_folder
from twoview.data.image_data import ImageData
from twoview.data.images import Images, LazyImages, TensorImages, split_labels
from twoview.data.preprocess import stored_size
from twoview.data.scan import read_all
from twoview.devices import available_memory, explained_memory, require_memory, size_in_bytes
from twoview.errors import require, require_at_least

log = logging.getLogger(__name__)

DEFAULT_BATCH = 256
Places = str | Sequence[str]  # one or several files, folders or glob patterns


class Split(NamedTuple):
    """Images found in one place.

    Attributes:
        source: paths or encoded images.
        class_names: class name of each image, None where unknown.
    """

    source: Sequence[Any]
    class_names: Sequence[str | None]


@dataclass(frozen=True)
class LoadSettings:
    """Settings for loading images, the options of :func:`folder`, :func:`parquet` and :func:`webdataset`.

    Args:
        image_size: height and width of the network's input in pixels.
        store_size: largest height and width of the stored images in pixels; larger images are reduced, with their
            aspect ratio. None for twice ``image_size``.
        channels: 1, 3, 4, or the number of channels of ``.npy`` and multi-channel TIFF files.
        batch_size: global batch size of pretraining; None for 256, or for the number of images if there are fewer.
        max_broken: largest share of the images that may be unreadable, in [0, 1]. Unreadable images are left out and
            listed. Images that become unreadable during training count too; each process of a run counts those that it
            meets, so that N processes may lose N times the share together.
        memory: largest size of decoded images to hold in memory, in bytes or as "500MB" or "2GB"; None for a quarter of
            the free memory.
        cache: where larger data sets are decoded once into a file: "auto" for the folder ``twoview`` in
            ``XDG_CACHE_HOME`` or ``~/.cache``, or a folder. The file is not written if less than 10 GB, or a tenth of
            a smaller disk, would stay free. False or "never" to decode images by loader processes in every epoch.
        num_workers: number of loader processes; None for one per core.
        allow_flip: whether horizontal flips preserve the meaning of the images.
        min_crop_area: smallest share of the area of an image that a crop may have, in [0, 1].
        seed: seed of the test split.
        listed: whether images are only listed. None is read at the start; all are in ``pretrain`` in the order of
            ``data.root``, and ``train`` and ``test`` are None.

    Raises:
        UserError: if a value is out of range.
    """

    image_size: int = 64
    store_size: int | None = None
    channels: int = 3
    batch_size: int | None = None
    max_broken: float = 0.01
    memory: float | str | None = None
    cache: bool | str | Path = "auto"
    num_workers: int | None = None
    allow_flip: bool = True
    min_crop_area: float = 0.0
    seed: int = 0
    listed: bool = False

    def __post_init__(self) -> None:
        require_at_least("data", 1, channels=self.channels, batch_size=self.batch_size, store_size=self.store_size)
        require_at_least("data", 0, num_workers=self.num_workers)
        require(0 <= self.max_broken <= 1, f"data.max_broken={self.max_broken}: give a share between 0 and 1")
        known = self.cache is False or (isinstance(self.cache, str | Path) and str(self.cache).strip())
        require(known, f"data.cache={self.cache}: give auto, false or a folder")
        _ = self.memory_bytes

    @property
    def cache_folder(self) -> Path | None:
        """Folder of caches; None to write none."""
        if self.cache is False or self.cache == "never":
            return None
        return default_folder() if self.cache == "auto" else Path(str(self.cache)).expanduser()

    @property
    def memory_bytes(self) -> float | None:
        """``memory`` in bytes."""
        return None if self.memory is None else size_in_bytes("data.memory", self.memory)


def find_shards(roots: Places, knob: str, suffixes: tuple[str, ...]) -> list[str]:
    """List the shards in one or several places.

    Args:
        roots: a file, a folder, a glob pattern, or a list of these.
        knob: name of the knob that sets ``roots``, for messages.
        suffixes: suffixes of the names of shards in a folder.

    Raises:
        UserError: if a place is not on a local disk, has no shards, or is a folder with the shards of several splits.
    """
    found: list[str] = []
    for root in roots if isinstance(roots, list | tuple) else [roots]:
        where = os.path.expanduser(str(root))
        local = "://" not in where and not where.startswith("pipe:")
        require(local, f"{knob}={root}: shards are read from local disks; copy them to one first")
        if os.path.isdir(where):
            files = sorted(str(path) for path in Path(where).rglob("*") if path.name.endswith(suffixes))
            # On the Hugging Face hub, file or folder names begin with the name of the split.
            parts = {part for file in files for part in Path(file).relative_to(where).parts}
            splits = {match[0] for part in parts if (match := re.match(r"train|test|valid|val", part))}
            message = f"this folder holds several splits ({', '.join(sorted(splits))}); give a pattern for one of them"
            example = f"such as {knob}={Path(where) / f'train*{suffixes[0]}'}"
            require(len(splits) < 2, f"{knob}={root}: {message}, {example}")
        else:
            files = [where] if os.path.exists(where) else sorted(glob.glob(where, recursive=True))
        require(files, f"{knob}={root}: no {suffixes[0]} file there; give a file, a folder or a pattern with *")
        special = [file for file in files if not os.path.isfile(file)]
        require(not special, f"{knob}={root}: {', '.join(special[:3])} is not a regular file; give another pattern")
        found += files
    return found


def load_splits(
    find: Callable[[Places, str], Split], root: Places, eval_root: Places | None, name: str, settings: LoadSettings
) -> ImageData:
    """Load the images of a run.

    Without ``eval_root``, a fixed fifth of the labeled images is held out as the test split. If only the images in
    ``eval_root`` have labels, they are split into training and test images of the evaluation. With fewer than 10
    labeled images there is no evaluation.

    Args:
        find: function ``(root, knob) -> Split`` that lists the images in one place.
        root: place of the images to pretrain on.
        eval_root: place of labeled test images, or None.
        name: name of the data set, for reports.
        settings: settings for loading images.

    Raises:
        UserError: if there are no images, a size is too small, or too many images are unreadable.
    """
    size, channels = stored_size(settings.image_size, settings.store_size), settings.channels
    require(root, f"data.root={root!r}: give a path")
    message = "this task reads data.root only; give both places as data.root=[A,B]"
    require(not (settings.listed and eval_root), f"data.eval_root={eval_root}: {message}")
    shared = _real(root) & _real(eval_root or ())
    require(not shared, f"data.eval_root={eval_root}: the same as data.root; give others, or null to split")
    found = {"data.root": find(root, "data.root")}
    if eval_root:
        found["data.eval_root"] = find(eval_root, "data.eval_root")
        _compare_classes(found)
    named = {label for split in found.values() for label in split.class_names if label is not None}
    # If all names are numbers, sort them as numbers: 2 before 10.
    classes = sorted(named, key=lambda label: (len(label) if all(map(str.isdigit, named)) else 0, label))
    numbers: dict[str | None, int] = {None: -1} | {label: number for number, label in enumerate(classes)}
    workers = (os.cpu_count() or 1) if settings.num_workers is None else settings.num_workers
    limits = (settings.allow_flip, settings.min_crop_area, settings.image_size, size)
    if settings.listed:
        source, names = found["data.root"]
        labels = torch.tensor([numbers[n] for n in names])
        images = LazyImages(source, labels, size, channels, workers, settings.max_broken)
        return ImageData(images, None, None, classes, _batch_size(len(images), settings.batch_size), name, *limits)
    budget = _free_bytes() / 4 if settings.memory_bytes is None else settings.memory_bytes
    needed = sum(len(split.source) for split in found.values()) * channels * size * size
    keep = needed <= budget
    advice = "set data.memory=0 to hold none of them, or a smaller data.store_size"
    if keep:
        require_memory(f"data.memory={settings.memory}: holding images of up to {size} pixels", needed, advice)
    splits, broken = [], []
    for knob, (source, names) in found.items():
        labels = torch.tensor([numbers[n] for n in names])
        images = LazyImages(source, labels, size, channels, workers, settings.max_broken)
        cache = None if keep else _cache(settings, images)
        with explained_memory(f"{knob}: out of memory; the images need {needed / 1e6:,.0f} MB; {advice}"):
            readable, unreadable = read_all(images, settings.max_broken, knob, keep, cache)
        _log_storage(readable, knob, settings.image_size, size)
        splits.append(readable)
        broken += unreadable
    pretrain, train, test = _split(splits, settings.seed)
    batch_size = _batch_size(len(pretrain), settings.batch_size)
    data = ImageData(pretrain, train, test, classes, batch_size, name, *limits)
    data.broken = broken
    return data


def _cache(settings: LoadSettings, images: LazyImages) -> DiskCache | None:
    """Where the images are decoded to if they do not fit in memory; None to decode them in every epoch."""
    folder, fingerprint = settings.cache_folder, getattr(images.source, "fingerprint", lambda: None)
    possible = folder is not None and hasattr(os, "pread")  # not on Windows
    key = fingerprint() if possible else None
    return None if folder is None or key is None else DiskCache(folder, key, len(images), images.channels, images.size)


def _log_storage(images: Images, knob: str, image_size: int, size: int) -> None:
    where, megabytes = "decoded in every epoch", len(images) * images.channels * images.size**2 / 1e6
    if isinstance(images, TensorImages):
        where = "held in memory" if images.rows is None else "read from a file"
    stored = f"long sides are reduced to {size} pixels, canvases have {images.size} pixels ({megabytes:,.0f} MB)"
    log.info("data: %s: %s, %s; network input: %d pixels", knob, stored, where, image_size)


def _real(places: Places) -> set[str]:
    """Places as absolute paths without links."""
    listed = places if isinstance(places, list | tuple) else [places]  # YAML reads a name such as 2024 as an integer
    return {os.path.realpath(os.path.expanduser(str(place))) for place in listed}


class DefaultBatch(int):
    """Batch size that was not chosen, and that training may reduce to a multiple of its number of processes."""


def _batch_size(images: int, given: int | None) -> int:
    """The given batch size; by default 256, or all images if there are fewer."""
    if given is None and images < DEFAULT_BATCH:
        log.info("data: data.batch_size is %d, the number of images, as there are fewer than %d", images, DEFAULT_BATCH)
    return DefaultBatch(min(images, DEFAULT_BATCH)) if given is None else given


def _compare_classes(found: dict[str, Split]) -> None:
    """Ignore the labels of ``data.root`` if the two places share no class; warn about missing classes."""
    first, second = found.values()
    ours, theirs = ({name for name in split.class_names if name is not None} for split in (first, second))
    if ours and theirs and not ours & theirs:
        message = "data: data.root (%s) and data.eval_root (%s) share no class, so data.root is taken as unlabelled"
        log.warning(message, *(", ".join(sorted(names)[:3]) for names in (ours, theirs)))
        found["data.root"] = Split(first.source, [None] * len(first.class_names))
    elif ours and theirs - ours:
        log.warning("data: data.root has no images of the test classes %s", ", ".join(sorted(theirs - ours)[:5]))


def _split(splits: Sequence[Images], seed: int) -> tuple[Images, Images | None, Images | None]:
    """Return images to pretrain on, and labeled training and test images; None for the latter two if there are few."""
    known = [torch.nonzero(split.labels >= 0).flatten() for split in splits]
    labelled = [s if len(k) == len(s) else s.subset(k) for s, k in zip(splits, known, strict=True)]
    if len(splits) == 2 and len(labelled[0]) and len(labelled[1]):
        return splits[0], labelled[0], labelled[1]
    if len(labelled[-1]) < 10:
        log.info("data: fewer than 10 labelled images: no evaluation")
        return splits[0], None, None
    train, test = split_labels(labelled[-1].labels, 0.2, seed)
    log.info("data: %d labelled images, a fixed fifth, are held out as the test split", len(test))
    fitted, tested = labelled[-1].subset(train), labelled[-1].subset(test)
    if len(splits) == 2:
        return splits[0], fitted, tested
    # Pretraining uses the unlabeled images too, but never the test images.
    unlabelled = torch.nonzero(splits[0].labels < 0).flatten()
    pretrain = splits[0].subset(torch.cat([known[0][train], unlabelled]).sort().values) if len(unlabelled) else fitted
    return pretrain, fitted, tested


def _free_bytes() -> float:
    free = available_memory(torch.device("cpu"))
    return free if math.isfinite(free) else 4e9
