"""Computation of the parts of a file of embeddings, in one or several processes."""

import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.spawn import ProcessException, start_processes
from torch.utils.data import DataLoader

from twoview.devices import pick_device
from twoview.encoder import Encoder
from twoview.errors import UserError
from twoview.tools.embedding_parts import Parts, check_broken
from twoview.tools.embedding_rows import KnownRows
from twoview.tools.embedding_source import Decoded, Source, State

log = logging.getLogger(__name__)

FEW = 4  # batches that are read faster than loader processes start
LOG_SECONDS = 10.0  # seconds between lines about the progress
TYPES = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class Job:
    """All that a process needs to compute parts.

    Args:
        encoder: network on the CPU.
        source: all images.
        parts: where the parts are written.
        keys: result of :meth:`Source.keys`.
        known: rows that need not be computed.
    """

    encoder: Encoder
    source: Source
    parts: Parts
    keys: np.ndarray
    known: KnownRows


def launched_ranks() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as torchrun sets them; (0, 1, 0) without it."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return rank, world, int(os.environ.get("LOCAL_RANK", str(rank)))


def compute(job: Job, devices: int) -> None:
    """Compute all missing parts in ``devices`` processes, which are started if there is more than one.

    Raises:
        UserError: if too many images are unreadable, features are not finite, or a part cannot be written.
    """
    if devices == 1:
        work(job, 0, 1, 0)
        return
    # A server that has imported this module once forks the processes; a fork of this one could deadlock in OpenMP.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    multiprocessing.set_forkserver_preload([__name__])
    progress = _Progress(multiprocessing.get_context(method).Array("q", 2))
    try:
        processes = start_processes(
            _started, (devices, job, progress.counts), nprocs=devices, join=False, start_method=method
        )
        while not processes.join(LOG_SECONDS):
            progress.show()
        progress.show()
    except ProcessException as error:
        sentence = str(error).rpartition("UserError: ")
        if not sentence[1]:
            raise
        raise UserError(sentence[2]) from error


def _started(rank: int, devices: int, job: Job, counts: Any) -> None:
    work(job, rank, devices, rank, counts)


def work(job: Job, rank: int, world: int, local_rank: int, counts: Any = None) -> None:
    """Compute the missing parts of one process: every ``world``-th part, beginning with part ``rank``.

    Args:
        job: what is computed.
        rank: rank of this process.
        world: number of processes.
        local_rank: rank on this machine, which selects the GPU.
        counts: array that all processes share, see :class:`_Progress`; None for the counts of this process.
    """
    parts, encoder = job.parts, job.encoder.to(_device(local_rank, world)).folded()
    todo = [_Part(job, number) for number in range(rank, len(parts), world) if not parts.is_complete(number)]
    there = len(range(rank, len(parts), world)) - len(todo)
    if there:
        log.info("embed: %d of %d parts are there already", there, there + len(todo))
    batches = [batch for part in todo for batch in part.batches]
    workers = job.source.num_workers if len(batches) > FEW else 0
    # Each process has its share of the loader processes, but at least one if there are any.
    loader = _loader(job.source, batches, max(min(workers, 1), workers // world))
    progress, broken = _Progress(counts), list[tuple[int, str, str]]()
    progress.add(total=sum(map(len, batches)))
    for part in todo:
        rows = _Rows(job, part)
        for batch in part.batches:
            rows.add(next(loader), encoder)
            progress.add(done=len(batch))
        parts.write(part.number, rows.table(), rows.broken)
        broken += rows.broken
        check_broken(parts, job.source.max_broken, broken)


def _device(local_rank: int, world: int) -> torch.device:
    device = pick_device()
    if device.type == "cpu" and world > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    return torch.device("cuda", local_rank % torch.cuda.device_count()) if device.type == "cuda" else device


def _loader(source: Source, batches: Any, workers: int) -> Iterator[Decoded]:
    yield from DataLoader(source, batch_size=None, sampler=batches, num_workers=workers, collate_fn=_identity)


def _identity(decoded: Any) -> Any:
    return decoded


class _Part:
    """What there is to do for a part: the rows that are known, and batches of the other positions."""

    def __init__(self, job: Job, number: int) -> None:
        self.number, self.positions = number, job.parts.positions(number)
        first, stop = self.positions.start, self.positions.stop
        self.known = job.known.find(job.keys[first:stop])
        self.batches = (first + torch.from_numpy(np.nonzero(self.known < 0)[0])).split(job.parts.plan.batch_size)
        if not len(self.batches[0]):
            self.batches = ()


class _Rows:
    """Rows of a part, in arrays that are filled as the images are read."""

    def __init__(self, job: Job, part: _Part) -> None:
        self.job, self.part, n = job, part, len(part.positions)
        self.dtype = TYPES[job.parts.plan.precision]
        self.done = np.zeros(n, bool)
        self.sizes, self.states = np.zeros((n, 2), np.int32), np.full((n, 2), -1, np.int64)
        self.vectors = np.empty((n, job.parts.schema.field("vector").type.list_size), self.dtype)
        self.thumbnails: list[bytes | None] = [None] * n
        self.broken: list[tuple[int, str, str]] = []
        places = np.nonzero(part.known >= 0)[0]
        for among, columns in job.known.take(part.known[places]):
            where = places[among].tolist()
            states = [job.source.state(part.positions[place]) for place in where]
            self._fill(where, columns["sizes"], states, columns["vector"], columns["thumbnail"])

    def add(self, decoded: Decoded, encoder: Encoder) -> None:
        """Compute the vectors of a batch, and store all that is known of it."""
        source, first = self.job.source, self.part.positions.start
        self.broken += [(position, source.path(position), reason) for position, reason in decoded.broken]
        if decoded.positions:
            vectors = encoder.apply_network(encoder.preprocess.normalized(decoded.pixels)).cpu().numpy()
            with np.errstate(over="ignore"):  # values above the range of fp16 become infinite, and are refused
                vectors = vectors.astype(self.dtype)
            where = [position - first for position in decoded.positions]
            self._fill(where, decoded.sizes, decoded.states, vectors, decoded.thumbnails)

    def table(self) -> Any:
        """Return a ``pyarrow.Table`` of the readable images."""
        import pyarrow as pa

        schema, source = self.job.parts.schema, self.job.source
        positions = [position for position, done in zip(self.part.positions, self.done, strict=True) if done]
        vectors = pa.array(self.vectors[self.done].reshape(-1))
        known = self.states[self.done] >= 0
        files = (pa.array(x, mask=~known[:, 0]) for x in self.states[self.done].T)
        columns = [
            pa.array([source.path(position) for position in positions], pa.string()),
            pa.array(positions, pa.int64()),
            pa.array([source.label(position) for position in positions], pa.string()),
            *(pa.array(x) for x in self.sizes[self.done].T),
            *files,
            pa.FixedSizeListArray.from_arrays(vectors, self.vectors.shape[1]).cast(schema.field("vector").type),
        ]
        if source.thumbnails:
            columns.append(pa.array([x for x in self.thumbnails if x is not None], pa.binary()))
        return pa.Table.from_arrays(columns, schema=schema)

    def _fill(
        self, where: list[int], sizes: Any, states: Sequence[State | None], vectors: np.ndarray, thumbnails: list[bytes]
    ) -> None:
        finite = np.isfinite(vectors).all(1)
        if not finite.all():
            first = self.job.source.path(self.part.positions[where[int(finite.argmin())]])
            precision = self.job.parts.plan.precision
            advice = "precision=fp32" if precision == "fp16" else "an earlier checkpoint"
            message = f"{int((~finite).sum())} images have features that are not finite (first: {first})"
            raise UserError(f"precision={precision}: {message}; give {advice}")
        self.done[where], self.sizes[where], self.vectors[where] = True, sizes, vectors
        self.states[where] = [state or (-1, -1) for state in states]
        for place, thumbnail in zip(where, thumbnails, strict=False):
            self.thumbnails[place] = thumbnail


class _Progress:
    """Numbers of images of one or several processes. The number and the speed are logged every ten seconds.

    Args:
        counts: shared array of the number of images to compute, and of those that are done. The process that created it
            logs it, since the processes that it started have no log. None for the counts of this process.
    """

    def __init__(self, counts: Any = None) -> None:
        self.counts = multiprocessing.Array("q", 2, lock=True) if counts is None else counts
        self.logs = counts is None
        self.start = self.logged = time.monotonic()

    def add(self, total: int = 0, done: int = 0) -> None:
        """Add to both numbers."""
        with self.counts.get_lock():
            self.counts[0] += total
            self.counts[1] += done
        if self.logs and time.monotonic() - self.logged > LOG_SECONDS:
            self.show()

    def show(self) -> None:
        """Log the numbers and the speed since the start."""
        (total, done), self.logged = self.counts[:], time.monotonic()
        speed = done / (self.logged - self.start)
        log.info("embed: %s of %s images, %s images/s", f"{done:,}", f"{total:,}", f"{speed:,.0f}")
