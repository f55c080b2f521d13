"""Pictures decoded when they are asked for, whatever they lie in; how they are checked, split, and kept if they fit."""

import copy
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from twoview.data.decode import square, square_and_shape
from twoview.data.images import Batch, ImageArrays, ImageData, in_order, moments, split_labels
from twoview.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 256  # pictures that a worker hands over at a time, at the most
CHUNK_BYTES = 2**23  # of their pixels


class Items(Sequence[Any]):
    """The pictures of anyone's Dataset, whose items are pictures or tuples that begin with one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Any) -> Any:
        item = self.dataset[int(position)]
        return item[0] if isinstance(item, tuple | list) else item


class Pictures(Dataset[Batch]):
    """Pictures decoded when they are asked for, many positions at a time; what :class:`ImageArrays` is in memory.

    A source whose pictures lie in blocks that are read whole says in ``source.starts`` where these begin.

    Args:
        source: what :func:`twoview.data.decode.square` takes, by position.
        labels: int64 ``[N]``, -1 where unknown.
        size: height and width after decoding, in pixels.
        channels: C of the images.
        positions: int64 ``[N]``, where each image lies in ``source``; None for all in order.
        num_workers: loader processes.
    """

    def __init__(
        self,
        source: Sequence[Any],
        labels: Tensor,
        size: int,
        channels: int,
        positions: Tensor | None = None,
        num_workers: int = 0,
    ) -> None:
        self.source, self.labels, self.size, self.channels = source, labels, size, channels
        self.positions = torch.arange(len(source)) if positions is None else positions
        self.num_workers = num_workers
        self.known_moments: Tensor | None = None  # of each picture, once all have been read

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, positions: Any) -> Batch:
        ids = torch.as_tensor(positions, dtype=torch.int64)
        return Batch(torch.stack([self._decode(int(i)) for i in ids]), ids, self.labels[ids])

    def subset(self, positions: Tensor) -> "Pictures":
        """The pictures at some positions."""
        part = self.with_labels(self.labels[positions])
        part.positions = self.positions[positions]
        part.known_moments = None if self.known_moments is None else self.known_moments[positions]
        return part

    def name(self, position: int) -> str:
        """Path of the picture at a position, or its number in the source."""
        return _name(self.source, int(self.positions[position]))

    @property
    def blocks(self) -> Tensor | None:
        """int64 ``[N]``, the block that each picture lies in; None where any order is as good as any other."""
        starts = getattr(self.source, "starts", None)
        return None if starts is None else torch.bucketize(self.positions, torch.as_tensor(starts), right=True)

    def with_labels(self, labels: Tensor) -> "Pictures":
        """The same pictures with other labels."""
        same = copy.copy(self)
        same.labels = labels
        return same

    def moments(self) -> Tensor:
        """float64 ``[N, 3, C]``, the statistics of each picture; see :func:`twoview.data.images.moments`."""
        if self.known_moments is None:
            self.known_moments = torch.cat([moments(batch.pixels) for batch in in_order(self)])
        return self.known_moments

    def _decode(self, position: int) -> Tensor:
        # All were read once before training; one that has broken since is replaced by the next that has not.
        for step in range(min(16, len(self))):
            where = int(self.positions[(position + step) % len(self)])
            try:
                return square(self.source[where], self.size, self.channels)
            except Exception as error:
                log.warning(
                    "%s can no longer be read (%s); the next one stands in for it", _name(self.source, where), error
                )
        raise OSError("16 pictures in a row can no longer be read: is the disk still there?")


class _Read(NamedTuple):
    """What a worker says of one chunk; pixels, or else moments, are of the readable pictures alone.

    Arrays, because a tensor would hold an open file of shared memory for as long as it is kept.
    """

    pixels: np.ndarray
    moments: np.ndarray
    good: np.ndarray
    broken: list[tuple[int, str]]
    kinds: Counter[str]
    shapes: Counter[tuple[int, int, int]]


def _as_it_is(read: Any) -> Any:
    return read


class _Scan(Dataset[_Read]):
    def __init__(self, pictures: Pictures, keep: bool) -> None:
        self.pictures, self.keep = pictures, keep

    def __getitem__(self, positions: Any) -> _Read:
        p, pixels, good, broken, kinds = self.pictures, [], [], [], Counter[str]()
        shapes = Counter[tuple[int, int, int]]()
        for position in torch.as_tensor(positions).tolist():
            try:
                item = p.source[position]
                one, shape = square_and_shape(item, p.size, p.channels)
            except Exception as error:
                broken.append((position, f"{type(error).__name__}: {error}"))
            else:
                pixels.append(one)
                good.append(position)
                shapes[shape] += 1
                kinds["packed" if isinstance(item, bytes) else Path(item).suffix.lower()] += 1
        stacked = torch.stack(pixels) if pixels else torch.zeros(0, p.channels, p.size, p.size, dtype=torch.uint8)
        # Either the pixels, whose statistics can be taken later, or the statistics.
        none = stacked.new_zeros(0, *stacked.shape[1:])
        kept, seen = (stacked, none) if self.keep else (none, stacked)
        return _Read(kept.numpy(), moments(seen).numpy(), np.array(good, dtype=np.int64), broken, kinds, shapes)


class Split(NamedTuple):
    """What a place holds: ``source`` of encoded pictures by position, and their class names, None where unknown."""

    source: Sequence[Any]
    names: Sequence[str | None]


def load_splits(
    find: Callable[[Any, str], Split],
    root: str | Sequence[str],
    eval_root: str | Sequence[str] | None,
    name: str,
    image_size: int = 64,
    store_size: int | None = None,
    channels: int = 3,
    batch_size: int = 256,
    max_broken: float = 0.01,
    memory: float | None = None,
    num_workers: int | None = None,
    mirror: bool = True,
    least_crop: float = 0.0,
    seed: int = 0,
) -> ImageData:
    """The images of a run from what is found at one or two places; pretraining never needs the labels.

    Without ``eval_root``, a fixed fifth of labelled pictures is kept out of pretraining for the test; with unlabelled
    pictures and a labelled ``eval_root``, that is split instead.

    Args:
        find: ``(root, knob) -> Split``, what is there.
        root: where the pictures to learn from are.
        eval_root: where labelled test pictures are.
        name: of the data set, for reports.
        image_size: height and width that the network sees, in pixels.
        store_size: the short side is resized to this and the centre square kept; None for 1.15 times ``image_size``.
        channels: 1, 3, 4, or those of ``.npy`` and multi-channel TIFF files.
        batch_size: global batch of pretraining.
        max_broken: greatest share of pictures that may be unreadable; they are left out and listed.
        memory: bytes of decoded pictures to hold; None for a quarter of what is free. What does not fit is decoded anew
            by loader processes in every epoch.
        num_workers: these processes; None for one a core, 0 for none.
        mirror: whether a mirrored picture is still the same thing.
        least_crop: share of a picture's area below which a crop may be of anything.
        seed: of the test split.

    Raises:
        UserError: sizes that do not fit each other, or too much broken.
    """
    if image_size < 8:
        raise UserError(f"data.image_size={image_size}: must be at least 8")
    size = store_size or round(1.15 * image_size)
    if size < image_size:
        raise UserError(f"data.store_size={store_size}: must be at least data.image_size={image_size}, or null")
    found = {"data.root": find(root, "data.root")}
    if eval_root:
        found["data.eval_root"] = find(eval_root, "data.eval_root")
    _compare_classes(found)
    # Numbers in their own order: 2 before 10.
    named = {label for split in found.values() for label in split.names if label is not None}
    classes = sorted(named, key=lambda label: (len(label) if all(map(str.isdigit, named)) else 0, label))
    numbers = {label: number for number, label in enumerate(classes)}
    workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    budget = _free_bytes() / 4 if memory is None else memory
    needed = sum(len(split.source) for split in found.values()) * channels * size * size
    splits, broken = [], []
    for knob, (source, names) in found.items():
        labels = torch.tensor([-1 if label is None else numbers[label] for label in names])
        pictures = Pictures(source, labels, size, channels, num_workers=workers)
        images, bad = _read_all(pictures, max_broken, knob, keep=needed <= budget)
        splits.append(images)
        broken += bad
    log.info(
        "data: short sides are resized to %d pixels, the centre squares kept (%d channels, %s MB) and %s; the network "
        "sees %dx%d of them",
        size,
        channels,
        f"{needed / 1e6:,.0f}",
        "held in memory" if needed <= budget else "decoded anew in every epoch",
        image_size,
        image_size,
    )
    pretrain, train, test = _split(splits, seed)
    data = ImageData(pretrain, train, test, classes, batch_size, name, mirror, least_crop, image_size)
    data.broken = broken
    return data


def _compare_classes(found: dict[str, Split]) -> None:
    """Labels of other things than those tested on are none; some missing ones are said."""
    if len(found) < 2:
        return
    (_, first), (knob, judged) = found.items()
    ours, theirs = ({name for name in split.names if name is not None} for split in (first, judged))
    if ours and theirs and not ours & theirs:
        log.warning(
            "data: data.root has classes %s, data.eval_root %s: none in common, so data.root is taken as unlabelled",
            ", ".join(sorted(ours)[:3]),
            ", ".join(sorted(theirs)[:3]),
        )
        found["data.root"] = Split(first.source, [None] * len(first.names))
    elif ours and theirs - ours:
        log.warning("data: no picture of data.root is of %s, which %s has", ", ".join(sorted(theirs - ours)[:5]), knob)


def from_dataset(
    dataset: Any,
    image_size: int = 64,
    channels: int = 3,
    batch_size: int = 256,
    test: Any = None,
    store_size: int | None = None,
    num_workers: int = 0,
) -> ImageData:
    """Anyone's own torch Dataset of pictures, or of tuples ``(picture, label)``.

    Args:
        dataset: with ``len()``; pictures are what :func:`twoview.data.decode.square` takes, labels whole numbers.
        image_size: height and width that the network sees, in pixels.
        channels: C of the images.
        batch_size: global batch of pretraining.
        test: another such Dataset, labelled, for the evaluation; None leaves the evaluation out.
        store_size: as for :func:`folder`.
        num_workers: loader processes.
    """
    size = store_size or round(1.15 * image_size)

    def pictures(given: Any) -> Pictures:
        first = given[0]
        labelled = isinstance(first, tuple | list) and len(first) > 1
        try:
            square(Items(given)[0], size, channels)
            int(first[1] if labelled else 0)
        except Exception as error:
            raise UserError(
                f"data: the first item of {type(given).__name__} is no picture, nor a tuple of one and its class "
                f"number ({error}); give PIL images, uint8 arrays or tensors, or floats in [0, 1], not normalised"
            ) from error
        labels = [int(given[i][1]) for i in range(len(given))] if labelled else [-1] * len(given)
        return Pictures(Items(given), torch.tensor(labels), size, channels, num_workers=num_workers)

    train = pictures(dataset)
    judged = pictures(test) if test is not None and int(train.labels.min()) >= 0 else None
    fitted = train if judged is not None else None
    classes = [str(i) for i in range(1 + max(int(p.labels.max()) for p in (train, judged or train)))]
    return ImageData(train, fitted, judged, classes, batch_size, type(dataset).__name__, image_size=image_size)


def _read_all(
    pictures: Pictures, max_broken: float, knob: str, keep: bool
) -> tuple[ImageArrays | Pictures, list[tuple[str, str]]]:
    """Decode every picture once: what is broken is known before training, what fits is kept, else its statistics."""
    n = len(pictures)
    chunks = list(torch.arange(n).split(max(1, min(CHUNK, CHUNK_BYTES // (pictures.channels * pictures.size**2)))))
    workers = pictures.num_workers if len(chunks) > 4 else 0  # processes cost more than a few pictures
    pixels, known, good = [], [], []
    broken: list[tuple[str, str]] = []
    kinds, shapes = Counter[str](), Counter[tuple[int, int, int]]()
    scan: Any = _Scan(pictures, keep)
    for read in DataLoader(scan, batch_size=None, sampler=chunks, num_workers=workers, collate_fn=_as_it_is):
        good.append(read.good)
        pixels.append(read.pixels)
        known.append(read.moments)
        broken += [(_name(pictures.source, position), reason) for position, reason in read.broken]
        kinds.update(read.kinds)
        shapes.update(read.shapes)
    found = f"{n - len(broken):,} pictures ({', '.join(f'{c:,} {k}' for k, c in kinds.most_common())})"
    counts = Counter(int(label) for label in pictures.labels)
    labels = f"{len(counts - Counter({-1: n}))} classes" if max(counts) >= 0 else "no labels"
    log.info("data: %s has %s, %s, %s; %d broken files", knob, found, _sizes(shapes), labels, len(broken))
    if len(broken) > max_broken * n or len(broken) == n:
        for name, reason in broken:
            log.warning("broken: %s (%s)", name, reason)
        first = "; ".join(f"{name} ({reason})" for name, reason in broken[:3])
        raise UserError(
            f"{knob}: {len(broken)} of {n} files cannot be read, more than data.max_broken={max_broken:g} allows "
            f"(first: {first}); mend them, or raise data.max_broken"
        )
    readable = pictures.subset(torch.from_numpy(np.concatenate(good)))
    if keep:
        names = [readable.name(i) for i in range(len(readable))]
        return ImageArrays(torch.from_numpy(np.concatenate(pixels)), readable.labels, readable.blocks, names), broken
    readable.known_moments = torch.from_numpy(np.concatenate(known))
    return readable, broken


def _sizes(shapes: Counter[tuple[int, int, int]]) -> str:
    if not shapes:
        return "none readable"
    heights, widths, bands = zip(*shapes, strict=True)
    span = "x".join(
        str(min(side)) if min(side) == max(side) else f"{min(side)} to {max(side)} " for side in (heights, widths)
    )
    return f"{span.strip()} pixels high and wide, {' or '.join(map(str, sorted(set(bands))))} channels"


def _split(
    splits: Sequence[ImageArrays | Pictures], seed: int
) -> tuple[ImageArrays | Pictures, ImageArrays | Pictures | None, ImageArrays | Pictures | None]:
    """What is learned from, and labelled pictures to fit and to test the probes with, or None."""
    labelled = [
        split if bool((split.labels >= 0).all()) else split.subset(torch.nonzero(split.labels >= 0).flatten())
        for split in splits
    ]
    if len(splits) == 2 and len(labelled[0]) and len(labelled[1]):
        return splits[0], labelled[0], labelled[1]
    whole = labelled[-1]
    if len(whole) < 10:
        log.info("data: too few labelled pictures for an evaluation, which is left out")
        return splits[0], None, None
    train, test = split_labels(whole.labels, 0.2, seed)
    log.info("data: %d labelled pictures are kept for the test, a fixed fifth", len(test))
    if len(splits) == 2:
        return splits[0], whole.subset(train), whole.subset(test)
    # Test pictures are not learned from; unlabelled ones are.
    fitted = whole.subset(train)
    unlabelled = torch.nonzero(splits[0].labels < 0).flatten()
    known = torch.nonzero(splits[0].labels >= 0).flatten()
    learned = splits[0].subset(torch.cat([known[train], unlabelled]).sort().values) if len(unlabelled) else fitted
    return learned, fitted, whole.subset(test)


def _name(source: Any, position: int) -> str:
    return str(source.name(position)) if hasattr(source, "name") else f"item {position}"


def _free_bytes() -> float:
    free = [float("inf")]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(1024.0 * int(line.split()[1]))
        # A container or a job of a cluster may be given less than the machine has.
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            free.append(float(limit) - float(used))
    except (OSError, ValueError):  # not Linux, or no such limit
        pass
    return min(free) if min(free) < float("inf") else 4e9
