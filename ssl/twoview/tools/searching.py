"""Build an index from a file of embeddings; search an index for images like those of a file or a folder."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from twoview.data.folder import list_images
from twoview.devices import pick_device
from twoview.encoder import Encoder
from twoview.errors import UserError, require
from twoview.evaluation.tables import Table
from twoview.files import write_csv
from twoview.loading import load
from twoview.reporting.tables import show
from twoview.tools.embedding_file import read_embeddings
from twoview.tools.incoming import checkpoint_of, with_preprocessing
from twoview.tools.index import Index, Neighbors
from twoview.tools.index_file import is_index
from twoview.tools.index_settings import IndexSettings

log = logging.getLogger(__name__)

BATCH = 64  # images that are decoded at once
SHOWN = 10  # queries whose table is printed


def build_index(
    embeddings: str | Path,
    to: str | Path,
    kind: str = "auto",
    half: bool = False,
    recall: float = 0.95,
    links: int = 32,
    construction: int = 64,
) -> Path:
    """Build an index from a Parquet file of embeddings, and write it.

    The index is written beside ``to`` and renamed, so that an existing index answers until the new one is complete.

    Args:
        embeddings: Parquet file of embeddings.
        to: file of the index; an existing index is replaced.
        kind: see :class:`twoview.tools.index_settings.IndexSettings`, as for the other arguments.
        half: whether vectors are stored in fp16.
        recall: recall@10 that an approximate index shall reach.
        links: links of each vector in the graph of "hnsw".
        construction: vectors that are considered for these links.

    Returns:
        The path of the index.

    Raises:
        UserError: if an argument is invalid, the embeddings cannot be read, or ``to`` cannot be written.
    """
    settings, place = IndexSettings(kind, half, recall, links, construction), Path(str(to)).expanduser()
    _check_place(place, Path(str(embeddings)).expanduser())
    index = Index.build(None, read_embeddings(embeddings, knob="embeddings"), settings)
    index.save(place)
    measured = "" if index.recall is None else f", recall@{index.recall['at']} {index.recall['value']:.3f}"
    size = place.stat().st_size / 1e6
    log.info("%s: %s index of %d vectors%s, %.0f MB", place, index.kind, len(index), measured, size)
    return place


def search(
    index: str | Path, query: str | Path, k: int = 10, checkpoint: str | Path | None = None, run_dir: str | Path = "run"
) -> Path:
    """Search an index for the images that are most similar to others, print them, and write ``search.csv``.

    Args:
        index: file of an index; or a ``.parquet`` file of embeddings, which is searched exactly.
        query: an image file, a folder of images, or a ``.txt`` or ``.csv`` list of image files.
        k: number of results for each query, >= 1.
        checkpoint: network of the index, a source for :func:`twoview.load`; None for the file that the index names.
        run_dir: folder of ``search.csv``, with the columns query, rank, path, label, similarity and id.

    Returns:
        The path of ``search.csv``.

    Raises:
        UserError: if there are no images, the index cannot be read, or the checkpoint is not that of the index.
    """
    require(isinstance(k, int) and k >= 1, f"k={k}: give a whole number, at least 1")
    files = _query_files(query)
    opened = open_index(index)
    encoder = network_of_index(opened, index, checkpoint)
    kept, vectors = _vectors_of(files, encoder.to(pick_device()))
    found = opened.search(opened.checkpoint, vectors, k)
    path = Path(run_dir) / "search.csv"
    rows = [
        [file, rank + 1, found.paths[i][rank], found.labels[i][rank], f"{similarity:.6f}", int(found.ids[i, rank])]
        for i, file in enumerate(kept)
        for rank, similarity in enumerate(found.similarity[i].tolist())
    ]
    write_csv(path, [["query", "rank", "path", "label", "similarity", "id"], *rows])
    _show(kept, found)
    log.info("search: %d of %d queries are shown, all are in %s", min(SHOWN, len(kept)), len(kept), path)
    return path


def open_index(index: str | Path) -> Index:
    """Open an index.

    Args:
        index: file of an index; or a ``.parquet`` file of embeddings, which is searched exactly.

    Raises:
        UserError: if there is no such file, or it cannot be read.
    """
    path = Path(str(index)).expanduser()
    require(path.is_file(), f"index={index}: there is no such file; give one that task=index or task=embed has written")
    return Index.build(None, path, IndexSettings("exact")) if path.suffix == ".parquet" else Index.load(path)


def network_of_index(opened: Index, index: str | Path, checkpoint: str | Path | None) -> Encoder:
    """Load the network of an index, with the preprocessing of the images of the index.

    Of what the index names, only a local file is loaded; nothing is downloaded.

    Args:
        opened: the index.
        index: file of the index, for messages.
        checkpoint: a source for :func:`twoview.load`; None for the file that the index names.

    Raises:
        UserError: if there is no such checkpoint, or it is not that of the index.
    """
    if checkpoint is None:
        named = opened.source
        message = f"the index names the checkpoint {named or '(none)'}, which is no file here; give checkpoint="
        require(named and Path(named).exists(), f"index={index}: {message}")
    source = opened.source if checkpoint is None else checkpoint
    random = str(source).startswith("random:")
    require(not random, f"checkpoint={source}: give the network of the index: a run folder, a .ckpt file or timm:NAME")
    encoder = load(source)
    given = checkpoint_of(encoder)
    message = f"its weights have the hash {given}, those of index={index} {opened.checkpoint}"
    advice = "give the checkpoint of the index, or embed the images with this one and build another index"
    require(given == opened.checkpoint, f"checkpoint={source}: {message}; {advice}")
    return with_preprocessing(encoder, opened.card, f"{index}")


def _check_place(to: Path, embeddings: Path) -> None:
    """Refuse a place that cannot be written, before the work is done."""
    require(embeddings.is_file(), f"embeddings={embeddings}: there is no such file; write it with task=embed")
    fits = not to.exists() or (to.is_file() and is_index(to))
    require(fits, f"to={to}: is not an index, and would be overwritten; choose another name")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(to.parent, os.W_OK)
    except OSError as error:
        raise UserError(f"to={to}: its folder cannot be created ({error.strerror}); choose another one") from error
    require(writable, f"to={to}: its folder cannot be written; choose another one")
    needed, free = 1.5 * embeddings.stat().st_size, shutil.disk_usage(to.parent).free
    message = f"the disk has {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed; free disk space"
    require(needed <= free, f"to={to}: {message}")


def _query_files(query: str | Path) -> Sequence[str]:
    path = Path(str(query)).expanduser()
    if path.is_file() and path.suffix.lower() not in (".txt", ".csv"):
        return [str(path)]
    require(path.exists(), f"query={query}: there is no such image or folder")
    return [str(file) for file in list_images(str(path), "query").source]


def _vectors_of(files: Sequence[str], encoder: Encoder) -> tuple[list[str], Tensor]:
    """Files that can be read, and their features ``[Q, F]``."""
    kept, parts = [], []
    for start in range(0, len(files), BATCH):
        images = []
        for file in files[start : start + BATCH]:
            try:
                images.append(encoder.preprocess.decoded(file)[0])
                kept.append(file)
            except MemoryError:
                raise
            except Exception as error:
                require(len(files) > 1, f"query={file}: cannot be read as an image ({error}); give another one")
                log.warning("search: %s cannot be read (%s) and is left out", file, error)
        if images:
            parts.append(encoder.apply_network(encoder.preprocess.normalized(torch.stack(images))).cpu())
    require(kept, f"query: none of {len(files)} files can be read as an image; give others")
    return kept, torch.cat(parts)


def _show(files: Sequence[str], found: Neighbors) -> None:
    for i, file in enumerate(files[:SHOWN]):
        rows = [
            [str(rank + 1), *map(_printable, (path, label)), str(number), f"{similarity:.4f}"]
            for rank, (path, label, number, similarity) in enumerate(
                zip(found.paths[i], found.labels[i], found.ids[i].tolist(), found.similarity[i].tolist(), strict=True)
            )
        ]
        show(Table(_printable(file), ["rank", "path", "label", "id", "similarity"], rows))


def _printable(text: str) -> str:
    """Names of files and labels may hold any character, such as those that control a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
