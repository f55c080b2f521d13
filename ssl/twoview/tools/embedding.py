"""Embed the images of a data set: write their features to a Parquet file, in steps that a killed run can resume."""

import contextlib
import datetime
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed as dist

from twoview import __version__
from twoview.data import ImageData, Images, LazyImages, TensorImages
from twoview.encoder import Encoder
from twoview.errors import require
from twoview.files import exclusive, remove_unfinished
from twoview.loading import load
from twoview.tools import embedding_columns, embedding_file
from twoview.tools.embedding_parts import Parts, Plan, check_broken, write_table
from twoview.tools.embedding_rows import KnownRows
from twoview.tools.embedding_source import Source
from twoview.tools.embedding_work import Job, compute, launched_ranks, work
from twoview.tools.incoming import checkpoint_of

log = logging.getLogger(__name__)

COLUMNS = ("thumbnail", "xy", "neighbors")
FIXED = ("checkpoint", "preprocessing", "precision")  # what rows depend on; an update cannot change it
BATCH = 256
MAX_NAMED = 100  # largest number of unreadable images that the metadata name


class Embedded(NamedTuple):
    """What :func:`embed` has written.

    Attributes:
        path: path of the file.
        images: number of rows.
        reused: number of rows that an update has taken from the former file.
        broken: path of each unreadable image, and the reason.
    """

    path: Path
    images: int
    reused: int
    broken: list[tuple[str, str]]


def embed(
    encoder: Encoder | str | Path,
    data: ImageData | Images | Callable[..., ImageData],
    to: str | Path,
    columns: Sequence[str] = (),
    precision: str = "fp32",
    update: bool = False,
    rerun: bool = False,
    devices: int = 1,
) -> Embedded:
    """Write the features of images to a Parquet file; :mod:`twoview.tools.embedding_file` describes its columns.

    Images are read once, in batches, and parts of 4,096 images are written to the folder ``TO.parts`` and joined at the
    end, so that memory does not grow with the number of images, except by their paths. The same call after an
    interruption of any kind computes only the missing parts, and the file is the same. Vectors equal
    ``encoder(image)`` for the whole image file. Under torchrun, each process computes a share of the parts.

    Args:
        encoder: an encoder, or a source for :func:`twoview.load`.
        data: images, or a function that lists or loads them, called with ``image_size`` and ``channels``. All splits
            of the data are embedded.
        to: path of the file, which ends in ``.parquet``.
        columns: additional columns: "thumbnail", a JPEG file with a long side of at most 96 pixels; "xy", the
            coordinates of a map by UMAP if the extra ``umap`` is installed, else by PCA; "neighbors", the 10 nearest
            rows by cosine distance. The last two read all vectors again, and "neighbors" compares all pairs.
        precision: "fp32" or "fp16" for the stored vectors; they are computed in fp32.
        update: whether rows of an existing file, or of an interrupted run, are taken over for image files with the
            same path, size and time of modification. Only the others are computed, and rows of images that are gone
            are left out.
        rerun: whether an existing file and the parts of an interrupted run are replaced.
        devices: number of processes that this function starts, with one GPU each if there are GPUs; 1 under torchrun.

    Returns:
        Path of the file, number of rows, and unreadable images.

    Raises:
        UserError: if an argument is invalid, the file exists and holds something else, an interrupted run used another
            checkpoint, data or settings, too many images are unreadable, or the disk is full.

    Example:
        >>> from twoview.data import digits
        >>> encoder = load("random:test_resnet", image_size=16, channels=1)
        >>> embed(encoder, digits(image_size=16), f"{folder}/vectors.parquet", precision="fp16").images
        1797
    """
    embedding_file.require_pyarrow(to, "to")
    to = _check_knobs(to, columns, precision, devices, update and rerun)
    encoder = encoder if isinstance(encoder, Encoder) else load(encoder)
    source, batch_size = _list_images(encoder, data, "thumbnail" in columns)
    keys, preprocessing = source.keys(), encoder.preprocess.plain
    plan = Plan(
        checkpoint=checkpoint_of(encoder),
        preprocessing=preprocessing,
        precision=precision,
        columns=sorted(set(columns), key=COLUMNS.index),
        batch_size=batch_size,
        images=len(source),
        data=source.fingerprint(keys),
    )
    metadata = {
        embedding_file.CHECKPOINT: plan.checkpoint.encode(),
        embedding_file.SOURCE: encoder.location.encode(errors="surrogateescape"),
        embedding_file.CARD: embedding_file.encoded(asdict(encoder.card)),
        embedding_file.PREPROCESSING: embedding_file.encoded(preprocessing),
        embedding_file.VERSION: __version__.encode(),
    }
    schema = embedding_file.schema(encoder.width, precision, source.thumbnails, metadata)
    parts = Parts(to.with_name(f"{to.name}.parts"), plan, schema)
    return _run(Job(encoder, source, parts, keys, KnownRows([], schema)), to, update, rerun, devices)


def _run(job: Job, to: Path, update: bool, rerun: bool, devices: int) -> Embedded:
    parts, (rank, world, local_rank) = job.parts, launched_ranks()
    finished = None if rerun else _check_former(parts, to, update)
    if finished is not None:
        log.info("embed: %s is complete; rerun=true would write it again", to)
        if rank == 0 and parts.folder.exists():  # killed before it was removed
            with exclusive(parts.folder):
                parts.remove()
        return finished
    message = "embed: %s images; if this run is stopped, the same command resumes it from %s"
    log.info(message, f"{parts.plan.images:,}", parts.folder)
    with exclusive(parts.folder) if rank == 0 else contextlib.nullcontext(), _group(world) as wait:
        if rank == 0:
            remove_unfinished(to)
            if rerun:
                parts.discard()
            parts.begin()
        wait()
        former = [path for path in [to, *parts.earlier()] if path.exists()] if update else []
        job = replace(job, known=KnownRows(former, parts.schema))
        if world > 1:
            work(job, rank, world, local_rank)
        else:
            compute(job, devices)
        wait()
        reused = int((job.known.find(job.keys) >= 0).sum())
        if rank:
            return Embedded(to, 0, reused, [])
        broken = _join(parts, to, job.source.max_broken)
        parts.remove()
    rows = parts.plan.images - len(broken)
    message = "embed: %s has %s rows, of which %s were taken over; unreadable images, which have no row: %s"
    log.info(message, to, f"{rows:,}", f"{reused:,}", f"{len(broken):,}")
    for path, reason in broken:
        log.warning("broken: %s (%s)", path, reason)
    return Embedded(to, rows, reused, broken)


def _check_knobs(to: str | Path, columns: Sequence[str], precision: str, devices: int, both: bool) -> Path:
    path = Path(str(to)).expanduser()
    require(path.suffix == ".parquet" and not path.is_dir(), f"to={to}: give the path of a file that ends in .parquet")
    for column in columns:
        require(column in COLUMNS, f"columns={column}: choose among {', '.join(COLUMNS)}")
    require(precision in embedding_file.PRECISIONS, f"precision={precision}: choose one of fp32, fp16")
    require(not both, "update=true rerun=true: the one keeps former rows and the other replaces them; give one of them")
    known = isinstance(devices, int) and devices >= 1
    require(known, f"trainer.devices={devices}: give a whole number, at least 1")
    world, gpus = launched_ranks()[1], torch.cuda.device_count()
    message = f"{world} processes have been started already; leave it out"
    require(devices == 1 or world == 1, f"trainer.devices={devices}: {message}")
    require(not gpus or devices <= gpus, f"trainer.devices={devices}: there are {gpus} GPUs; give at most {gpus}")
    return path


def _list_images(
    encoder: Encoder, data: ImageData | Images | Callable[..., ImageData], thumbnails: bool
) -> tuple[Source, int]:
    """List the images, and return them with the batch size."""
    card = encoder.card
    if callable(data) and not isinstance(data, TensorImages | LazyImages):
        given: dict[str, Any] = {"image_size": card.image_size, "channels": card.channels}
        if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(data).parameters.values()):  # files
            given |= {"listed": True} | ({"store_size": card.store_size} if card.store_size else {})
        data = data(**given)
    splits = {"images": data} if isinstance(data, TensorImages | LazyImages) else data.splits
    channels = next(iter(splits.values())).channels
    message = f"the images have {channels} channels, the checkpoint needs {card.channels}"
    require(channels == card.channels, f"data.channels={channels}: {message}")
    classes, batch_size = (data.classes, data.batch_size) if isinstance(data, ImageData) else ([], BATCH)
    return Source(splits, classes, encoder.preprocess, thumbnails), batch_size


def _check_former(parts: Parts, to: Path, update: bool) -> Embedded | None:
    """Refuse what would be lost or would not fit; return what is written already if it is all that was asked for."""
    plan, stored = parts.plan, parts.stored_plan()
    if to.exists():
        with embedding_file.open_embeddings(to, "to") as handle:
            found, rows = embedding_file.metadata(handle.schema_arrow), handle.metadata.num_rows
        former = found["plan"] if isinstance(found.get("plan"), dict) else {}
        if former == plan.plain:
            return Embedded(to, rows, 0, _named(found.get("broken")))
        if stored != plan.plain:
            _refuse(plan, former, f"to={to}: this file exists, with other content", update)
    if stored is not None and stored != plan.plain:
        _refuse(plan, stored, f"{parts.folder}: this folder holds an unfinished run with other settings", update)
    return None


def _refuse(plan: Plan, stored: Any, what: str, update: bool) -> None:
    """Raise :class:`UserError` unless the rows of a former run may be taken over."""
    fixed, differ = plan.differences(stored, FIXED), plan.differences(stored)
    advice = "make them equal, choose another file, or replace it with rerun=true"
    require(not fixed, f"{what} ({'; '.join(fixed)}); {advice}")
    advice = "add update=true to compute only what is new or changed, or rerun=true to replace it"
    require(update, f"{what} ({'; '.join(differ)}); {advice}")


def _named(broken: Any) -> list[tuple[str, str]]:
    """Unreadable images that the metadata name."""
    first = broken.get("first") if isinstance(broken, dict) else None
    return [(str(x[0]), str(x[1])) for x in first or () if isinstance(x, list) and len(x) == 2]


@contextlib.contextmanager
def _group(world: int) -> Iterator[Callable[[], object]]:
    """Join the processes that torchrun has started; yields a function that waits for all of them."""
    if world == 1 or dist.is_initialized():
        yield dist.barrier if world > 1 else lambda: None
        return
    # A process that ends is noticed at once, so that the limit is only for processes that hang.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    try:
        yield dist.barrier
    finally:
        dist.destroy_process_group()


def _join(parts: Parts, to: Path, max_broken: float) -> list[tuple[str, str]]:
    """Write all parts to one file, with the columns that depend on all of them; return the unreadable images."""
    import pyarrow as pa

    lost, starts = [], [0]
    for number in range(len(parts)):
        table, broken = parts.read(number)
        lost += broken
        starts.append(starts[-1] + len(table))
    check_broken(parts, max_broken, lost)
    named = [(path, reason) for _, path, reason in lost]
    columns, rows = list(parts.plan.columns), starts[-1]
    kind = embedding_columns.map_kind() if "xy" in columns and rows > 1 else ""
    if kind:
        log.info("embed: the columns x and y are coordinates by %s", kind)
    points, nearest = _of_all_rows(parts, columns, kind, rows)
    metadata = {
        **parts.schema.metadata,
        embedding_file.PLAN: embedding_file.encoded(parts.plan.plain),
        embedding_file.BROKEN: embedding_file.encoded({"count": len(named), "first": named[:MAX_NAMED]}),
        **({embedding_file.MAP: kind.encode()} if kind else {}),
    }
    schema = pa.schema([*parts.schema, *embedding_columns.fields(columns)], metadata)

    def tables() -> Iterator[Any]:
        for number in range(len(parts)):
            table, _ = parts.read(number)
            added = embedding_columns.arrays(points, nearest, starts[number], starts[number + 1])
            yield pa.Table.from_arrays([*table.columns, *added], schema=schema)

    write_table(to, schema, tables())
    return named


def _of_all_rows(parts: Parts, columns: Sequence[str], kind: str, rows: int) -> tuple[Any, Any]:
    """Coordinates of the map, and nearest rows with distances; None for columns that were not asked for."""
    points = nearest = vectors = None
    if "neighbors" in columns or kind == "UMAP":
        from twoview.evaluation.feature_store import collect_features  # takes seconds to import

        shape = (rows, parts.schema.field("vector").type.list_size)
        vectors = collect_features(lambda: map(torch.from_numpy, parts.vectors()), shape, folder=str(parts.folder))
    if kind:
        points = embedding_columns.map_coordinates(vectors, parts.vectors, kind)
    elif "xy" in columns:  # a single image
        points = np.zeros((rows, 2), np.float32)
    if "neighbors" in columns and vectors is not None:
        nearest = embedding_columns.nearest_rows(vectors)
    return points, nearest
