"""Features in memory, or in a file that is mapped into memory if they are larger than a limit."""

import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from twoview.data import Images
from twoview.devices import available_memory, size_in_bytes
from twoview.encoder import Encoder
from twoview.errors import UserError, require
from twoview.evaluation import progress
from twoview.evaluation.cache import cached, key
from twoview.files import open_regular, remove_left_over, write_atomically

log = logging.getLogger(__name__)

ROWS = 4096  # rows of features that are converted or checked at once


def memory_limit(memory: float | str | None) -> float:
    """Return the largest size in bytes of features that are held in memory.

    Args:
        memory: the limit in bytes or as "500MB" or "2GB"; None for a quarter of the free memory.

    Raises:
        UserError: if ``memory`` is not a size.

    Example:
        >>> memory_limit("2GB")
        2000000000.0
    """
    if memory is not None:
        return size_in_bytes("eval.memory", memory)
    return available_memory(torch.device("cpu")) / 4


def collect_features(
    parts: Callable[[], Iterable[Tensor]],
    shape: tuple[int, int],
    memory: float | str | None = None,
    folder: str | None = None,
    name: Callable[[], str] | None = None,
) -> Tensor:
    """Concatenate blocks of features in memory, or in a file if they are larger than a limit.

    Features in a file are read from the disk as they are used, and memory that they take is given back when it is
    needed. They are read-only: writing to this tensor ends the process. A temporary file has no entry in its folder.
    Its disk space is freed with the tensor or with the process, even after an error.

    Args:
        parts: function that returns the blocks, fp32 ``[n, F]`` each, N rows in total.
        shape: N and F.
        memory: see :func:`memory_limit`.
        folder: folder of the file; None, or a folder that cannot be written, for the system's temporary folder.
        name: function that returns the name under which the file is kept in ``folder`` for further calls, such as a
            hash of everything that the features depend on; None for a temporary file.

    Returns:
        fp32 ``[N, F]`` on the CPU.

    Raises:
        UserError: if the disk has no room for the file.

    Example:
        >>> blocks = torch.arange(6.0).view(3, 2).split(2)
        >>> collect_features(lambda: blocks, (3, 2), memory=0).tolist()
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """
    needed, limit = 4 * math.prod(shape), memory_limit(memory)
    if needed <= limit:
        features, row = torch.empty(shape), 0
        for part in parts():
            features[row : row + len(part)] = part
            row += len(part)
        return features[:row]
    place = _writable(folder)
    kept = None if place is None or name is None else place / f"{name()}.features"
    found = None if kept is None else _kept(kept, shape)
    if found is not None:
        return found
    place = place or Path(tempfile.gettempdir())
    explain = _explanation(memory, needed, limit, place)
    free = shutil.disk_usage(place).free
    require(needed <= free, explain(f"{free / 1e9:,.1f} GB are free"))
    message = "evaluation: %s features of %s images (%.1f GB) are written to a file in %s"
    log.info(message, shape[1], shape[0], needed / 1e9, place)
    if kept is not None:
        remove_left_over(place, seconds=3600)  # of killed evaluations; others may be at work
        write_atomically(kept, lambda handle: _write_by_name(handle.name, parts(), explain))
        with open_regular(kept) as file:
            return _mapped(file, shape)
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        _write(file, parts(), explain)
        return _mapped(file, shape)


def network_features(
    encoder: Encoder, images: Images, batch_size: int, memory: float | str | None = None, cache: str | None = None
) -> Tensor:
    """Compute the features of images, or take them from the cache.

    Args:
        encoder: the network, on the device of the computation.
        images: N images.
        batch_size: number of images per forward pass.
        memory: see :func:`memory_limit`.
        cache: folder in which features are stored for further calls; None to store none.

    Returns:
        fp32 ``[N, F]`` on the CPU, in memory or in a file; see :func:`collect_features`.

    Raises:
        UserError: if features are not finite, or the disk has no room for them.
    """
    shape = (len(images), encoder.width)
    name = partial(key, encoder.network, encoder.preprocess, images)

    def parts() -> Iterator[Tensor]:
        for part in encoder.folded().features(images, batch_size):
            progress.add_steps(done=len(part))
            yield part

    progress.add_steps(total=len(images))
    collect = partial(collect_features, parts, shape, memory)

    def fits(found: Any) -> bool:
        return isinstance(found, Tensor) and found.dtype == torch.float32 and found.shape == shape

    if 4 * math.prod(shape) > memory_limit(memory):
        features = collect(cache, name)
    else:
        features = cached(cache, name, collect, fits)
    bad = sum(int((~part.isfinite()).any(1).sum()) for part in features.split(ROWS))
    message = f"{bad} of {len(features)} images have features that are not finite; take an earlier checkpoint"
    require(not bad, f"checkpoint: {message}")
    return features


def pixel_features(
    pixels: Tensor, memory: float | str | None = None, folder: str | None = None, basis: Tensor | None = None
) -> Tensor:
    """Return pixels as features in [0, 1], or the projection of these features.

    Args:
        pixels: uint8 ``[N, C, s, s]``.
        memory: see :func:`memory_limit`.
        folder: folder of a temporary file; see :func:`collect_features`.
        basis: fp32 ``[C * s * s, K]``, directions of the projection, each a column; None for no projection.

    Returns:
        fp32 ``[N, C * s * s]`` or ``[N, K]`` on the CPU, in memory or in a file; see :func:`collect_features`.

    Raises:
        UserError: if the disk has no room for them.
    """
    shares = (part.flatten(1).float() / 255 for part in pixels.split(ROWS))
    parts = (part if basis is None else part @ basis for part in shares)
    width = pixels[0].numel() if basis is None else basis.shape[1]
    return collect_features(lambda: parts, (len(pixels), width), memory, folder)


def _writable(folder: str | None) -> Path | None:
    """The folder, which is created; None, and a warning, if it cannot be written."""
    if folder is None:
        return None
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(path, os.W_OK) else "Permission denied"
    except OSError as error:
        reason = str(error.strerror)
    if not reason:
        return path
    log.warning("eval.cache=%s: cannot be written (%s)", folder, reason)
    return None


def _explanation(memory: Any, needed: float, limit: float, place: Path) -> Callable[[str], str]:
    """Function of a reason that returns the message for a disk without room."""
    start = f"eval.memory={'null' if memory is None else memory}: the features need {needed / 1e9:,.1f} GB, which is"
    start += f" more than the {limit / 1e9:,.1f} GB that may be held in memory, and the disk of {place} has no room"
    advice = "free disk space, set eval.cache or the environment variable TMPDIR to a folder on another disk"
    return lambda reason: f"{start} ({reason}); {advice}, or raise eval.memory"


def _write(file: BinaryIO, parts: Iterable[Tensor], explain: Callable[[str], str]) -> None:
    """Write blocks to an unbuffered file. Writing to a mapped file would end the process on a full disk."""
    for part in parts:
        array: Any = part.contiguous().numpy()
        rest = memoryview(array).cast("B")
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise UserError(explain(str(error.strerror))) from error


def _write_by_name(path: str, parts: Iterable[Tensor], explain: Callable[[str], str]) -> None:
    with open(path, "r+b", buffering=0) as file:
        _write(file, parts, explain)


def _kept(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Features that a former call has kept; None if there are none, or the file has another size."""
    if not path.exists():
        return None
    try:
        with open_regular(path) as file:
            features = _mapped(file, shape)
        log.info("%s: taken from the cache", path)
        return features
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); computing it again", path, error)
        return None


def _mapped(file: BinaryIO, shape: tuple[int, int]) -> Tensor:
    """Map an open file as read-only fp32 tensor; Linux would count a mapping that can be written as memory."""
    if os.fstat(file.fileno()).st_size != 4 * math.prod(shape):
        raise ValueError("the file has another size")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(np.memmap(file, np.float32, "r", shape=shape))
