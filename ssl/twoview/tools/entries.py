"""What an index knows about its images: vectors, ids, paths and labels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Texts(Sequence[str]):
    """Texts in one array of bytes, which takes less memory than a list of a million strings.

    Args:
        blob: uint8, the texts in UTF-8, one after the other; characters that UTF-8 cannot encode, in names of files,
            are surrogates.
        ends: int64 ``[N + 1]``, 0 and the end of each text in ``blob``.
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Encode texts."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, position: Any) -> Any:
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        position %= len(self)
        return self.blob[self.ends[position] : self.ends[position + 1]].tobytes().decode("utf-8", "surrogateescape")

    def where(self, mask: np.ndarray) -> "Texts":
        """Return the texts at which a boolean ``[N]`` is true."""
        sizes = np.diff(self.ends)
        return Texts(self.blob[np.repeat(mask, sizes)], np.cumsum(np.append(0, sizes[mask]), dtype=np.int64))

    def followed_by(self, others: "Texts") -> "Texts":
        """Return these texts, then others."""
        blob = np.concatenate([self.blob, others.blob])
        return Texts(blob, np.concatenate([self.ends, others.ends[1:] + self.ends[-1]]))


@dataclass(frozen=True)
class Entries:
    """Entries of an index in the order in which they were added.

    Args:
        vectors: fp32 or fp16 ``[N, D]`` of unit length or zero.
        ids: int64 ``[N]``, different from each other.
        paths: N paths of images, empty where unknown.
        labels: N labels, empty where unknown.
    """

    vectors: Tensor
    ids: Tensor
    paths: Texts
    labels: Texts

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, mask: Tensor) -> "Entries":
        """Return the entries at which a boolean ``[N]`` is true; the vectors are copied."""
        rows = mask.numpy()
        return Entries(self.vectors[mask], self.ids[mask], self.paths.where(rows), self.labels.where(rows))

    def followed_by(self, others: "Entries", vectors: Tensor | None = None) -> "Entries":
        """Return these entries, then others.

        Args:
            others: further entries.
            vectors: the vectors of both if they are known, else they are concatenated.
        """
        joined = torch.cat([self.vectors, others.vectors]) if vectors is None else vectors
        ids = torch.cat([self.ids, others.ids])
        return Entries(joined, ids, self.paths.followed_by(others.paths), self.labels.followed_by(others.labels))
