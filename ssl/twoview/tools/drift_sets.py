"""The two sets of embeddings that are compared: read, checked against each other, and sampled."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twoview.devices import require_memory
from twoview.errors import UserError, require
from twoview.tools.drift_settings import LEAST
from twoview.tools.embedding_file import Embeddings, read_embeddings
from twoview.tools.incoming import as_embeddings

Vectors = str | Path | Embeddings | Tensor | np.ndarray
COPIES = 6  # of the pooled vectors in float64 that the tests hold at once


@dataclass(frozen=True)
class Sample:
    """A set of embeddings, and the sample of it that is compared.

    Args:
        content: all embeddings.
        rows: int64 ``[n]``, rows of the sample in random order.
        vectors: float64 ``[n, D]``, vectors of these rows.
    """

    content: Embeddings
    rows: np.ndarray
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.content.vectors)

    def name(self, row: int) -> str:
        """Return the path or name of an image, or the number of its row."""
        return self.content.paths[row] or f"row {row}"

    def label(self, row: int) -> str | None:
        """Return the class name of an image; None if it is not known."""
        return self.content.labels[row]


def read_pair(reference: Vectors, current: Vectors) -> tuple[Embeddings, Embeddings]:
    """Read both sets and refuse sets that cannot be compared.

    Args:
        reference: path of a Parquet file of embeddings, :class:`Embeddings`, or floating point numbers ``[N, D]``.
        current: in the same form or another one; vectors of the same network.

    Raises:
        UserError: if a set cannot be read, has too few images or vectors that are not finite, or the sets are of
            different networks, preprocessing or widths.
    """
    first, second = _read(reference, "reference"), _read(current, "current")
    widths = first.vectors.shape[1], second.vectors.shape[1]
    message = f"has vectors of {widths[1]} dimensions, the reference of {widths[0]}; embed both by the same network"
    require(widths[0] == widths[1], f"current: {message}")
    for name in ("checkpoint", "preprocessing"):
        known = [found.metadata.get(name) for found in (first, second)]
        theirs, ours = (_short(value) for value in known)
        message = f"is of {name} {ours}, the reference of {theirs}; embed both in the same way"
        require(None in known or known[0] == known[1], f"current: {message}")
    return first, second


def sample(content: Embeddings, most: int, generator: np.random.Generator) -> Sample:
    """Draw at most so many rows, in random order."""
    rows = generator.permutation(len(content.vectors))[:most]
    return Sample(content, rows, content.vectors[torch.from_numpy(rows)].double().numpy())


def check_memory(sizes: tuple[int, int], width: int, max_images: int) -> None:
    """Refuse samples that do not fit in memory.

    Args:
        sizes: numbers of images of the sets.
        width: number of dimensions.
        max_images: largest number of images of each sample.

    Raises:
        UserError: if the kernel matrix and copies of the vectors need more memory than there is.
    """
    pooled = sum(min(size, max_images) for size in sizes)
    needed = 8 * (4 * pooled**2 + COPIES * pooled * width)
    require_memory(f"max_images={max_images}: comparing {pooled:,} vectors", needed, "choose a smaller one")


def _read(source: Vectors, knob: str) -> Embeddings:
    if isinstance(source, str | Path):
        source = read_embeddings(source, knob=knob)
    try:
        known = isinstance(source, Embeddings)
        found = as_embeddings(None, source) if known else _of_array(torch.as_tensor(source))
    except UserError as error:
        raise UserError(f"{knob}: {error}") from error
    count = len(found.vectors)
    require(count >= LEAST, f"{knob}: has {count} images; at least {LEAST} are needed to compare")
    return found


def _of_array(vectors: Tensor) -> Embeddings:
    fits = vectors.ndim == 2 and vectors.is_floating_point()
    require(fits, f"vectors: give floating point numbers [N, D], not {vectors.dtype} {list(vectors.shape)}")
    found = as_embeddings("array", vectors.detach().cpu().float())  # checks sizes and values
    return found._replace(metadata={})


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
