"""The file of an index: one ``.safetensors`` file, replaced by one rename."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twoview.errors import UserError
from twoview.files import remove_unfinished
from twoview.tools.embedding_file import MAX_WIDTH
from twoview.tools.entries import Entries, Texts
from twoview.tools.index_settings import KINDS, IndexSettings
from twoview.torch_files import hash_tensors, map_safetensors, write_safetensors

VERSION = 2  # version 1 holds the recall of vectors that were not left out of the search; it is not taken over
BLOCK = 65_536  # vectors that are checked at once
LONGEST = 1.01  # length of a vector of unit length in fp16, at most
LARGEST_ID = 2**62


@dataclass(frozen=True)
class StoredIndex:
    """Content of an index.

    Args:
        entries: vectors, ids, paths and labels.
        alive: boolean ``[N]``, False for removed entries; None if there are none.
        found_by: tensors of :class:`twoview.tools.approximate.Hnsw` or ``IvfPq``, by name; empty for "exact".
        effort: how much of them is searched.
        kind: "exact", "hnsw" or "ivfpq".
        settings: settings of the index.
        checkpoint: hash of the weights of the network that the vectors are from.
        card: its model card; empty if it is not known.
        source: file or name that it was loaded from; empty if it is not known.
        recall: recall@10 and how it was measured; None if it was not.
        next_id: smallest id that was never given.
    """

    entries: Entries
    alive: Tensor | None
    found_by: Mapping[str, Tensor]
    effort: int
    kind: str
    settings: IndexSettings
    checkpoint: str
    card: dict[str, Any]
    source: str
    recall: dict[str, Any] | None
    next_id: int


def write_index(path: Path, stored: StoredIndex) -> None:
    """Write an index beside its place, and rename it.

    Raises:
        OSError: if the folder cannot be written or the disk is full; ``path`` is then unchanged.
    """
    entries = stored.entries
    texts = {"paths": entries.paths, "labels": entries.labels}
    others = {
        "ids": entries.ids,
        **{f"{name}_ends": torch.from_numpy(text.ends) for name, text in texts.items()},
        **{f"search_{name}": value for name, value in stored.found_by.items()},
        **({} if stored.alive is None else {"alive": stored.alive.to(torch.uint8)}),
        **{name: torch.from_numpy(text.blob.copy()) for name, text in texts.items()},
    }
    # Products of mapped vectors equal those of vectors in memory in every bit if both are aligned in the same way.
    padding = torch.zeros(-entries.vectors.nbytes % 8, dtype=torch.uint8)
    rest = dict(sorted(others.items(), key=lambda item: -item[1].element_size()))
    tensors = {"vectors": entries.vectors, "padding": padding, **rest}
    plain = {f.name: getattr(stored, f.name) for f in fields(stored) if f.name not in ("entries", "alive", "found_by")}
    plain |= {"version": VERSION, "settings": asdict(stored.settings)}
    text = json.dumps(plain, default=str)
    remove_unfinished(path)
    write_safetensors(path, tensors, {"twoview.index": text, "checksum": _checksum(text, tensors)})


def is_index(path: Path) -> bool:
    """Whether a file is an index by its header; its content is not checked."""
    try:
        return "twoview.index" in map_safetensors(path)[1]
    except (OSError, ValueError):
        return False


def read_index(path: str | Path) -> StoredIndex:
    """Read an index, whose vectors are mapped into memory, and check all of it.

    Raises:
        UserError: if it cannot be read, is damaged, or is no index.
    """
    try:
        tensors, metadata = map_safetensors(Path(path).expanduser())
        if "twoview.index" not in metadata:
            raise ValueError("another file")
        text = metadata["twoview.index"]
        if metadata.get("checksum") != _checksum(text, tensors):
            raise ValueError("its checksum differs")
        return _checked(json.loads(text), tensors)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError | TypeError) else str(error)
        message = f"cannot be read as an index ({reason}); build it again with task=index"
        raise UserError(f"index={path}: {message}") from error


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.blake2b((text + hash_tensors(tensors)).encode(), digest_size=16).hexdigest()


def _checked(plain: Any, tensors: Mapping[str, Tensor]) -> StoredIndex:
    """Check the plain values and the tensors, except for those of the search, which have own checks."""
    if plain["version"] not in (1, VERSION):
        raise ValueError(f"version {plain['version']}; it was written by another version of twoview")
    settings, count = IndexSettings(**plain["settings"]), len(tensors["ids"])
    _check_vectors(tensors["vectors"], count, settings.half)
    ids, next_id = tensors["ids"], plain["next_id"]
    _require(ids.dtype == torch.int64 and ids.ndim == 1, "ids")
    _require(isinstance(next_id, int) and 0 <= next_id <= LARGEST_ID, "next_id")
    _require(not count or (int(ids.min()) >= 0 and int(ids.max()) < next_id), "ids")
    _require(len(ids.unique()) == count, "ids")
    alive = tensors["alive"].bool() if "alive" in tensors else None
    _require(alive is None or alive.shape == (count,), "alive")
    effort, recall = plain["effort"], plain["recall"] if plain["version"] == VERSION else None
    _require(plain["kind"] in KINDS, "kind")
    _require(isinstance(effort, int) and 1 <= effort < 2**20, "effort")
    _require(all(isinstance(plain[name], str) for name in ("checkpoint", "source")), "checkpoint")
    _require(isinstance(plain["card"], dict), "card")
    known = recall is None or (isinstance(recall["value"], float) and 0 <= recall["value"] <= 1)
    _require(known and (recall is None or isinstance(recall["vectors"], int)), "recall")
    entries = Entries(tensors["vectors"], ids, _texts(tensors, "paths", count), _texts(tensors, "labels", count))
    found_by = {name.removeprefix("search_"): t for name, t in tensors.items() if name.startswith("search_")}
    same = {name: plain[name] for name in ("kind", "checkpoint", "card", "source")}
    return StoredIndex(entries, alive, found_by, effort, settings=settings, recall=recall, next_id=next_id, **same)


def _require(fits: bool, name: str) -> None:
    if not fits:
        raise ValueError(f"{name} is out of range or of another type")


def _check_vectors(vectors: Tensor, count: int, half: bool) -> None:
    dtype = torch.float16 if half else torch.float32
    _require(vectors.dtype == dtype and vectors.ndim == 2 and len(vectors) == count, "vectors")
    # faiss allocates memory for each dimension, also without vectors.
    _require(0 < vectors.shape[1] <= MAX_WIDTH, "the number of dimensions")
    for part in vectors.split(BLOCK):
        length = torch.linalg.vector_norm(part.float(), dim=1)
        # A comparison with NaN is false.
        _require(bool(((length < LONGEST) & ((length > 1 / LONGEST) | (length == 0))).all()), "the length of a vector")


def _texts(tensors: Mapping[str, Tensor], name: str, count: int) -> Texts:
    blob, ends = tensors[name], tensors[f"{name}_ends"]
    _require(blob.dtype == torch.uint8 and blob.ndim == 1, name)
    _require(ends.dtype == torch.int64 and ends.shape == (count + 1,), name)
    sizes, inside = ends.diff(), ends.numel() and 0 <= int(ends.min()) <= int(ends.max()) <= len(blob)
    _require(bool(inside) and bool((sizes >= 0).all()) and int(ends[0]) == 0 and int(ends[-1]) == len(blob), name)
    return Texts(blob.numpy(), ends.numpy())
