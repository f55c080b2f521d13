"""Images in folders of any nesting and in lists of files, with or without labels."""

import csv
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twoview.data.decode import SUFFIXES
from twoview.data.disk_cache import files_fingerprint
from twoview.data.image_data import ImageData
from twoview.data.splits import LoadSettings, Places, Split, load_splits
from twoview.errors import UserError, require
from twoview.files import open_regular

log = logging.getLogger(__name__)

SPLIT_NAMES = {"train", "training", "test", "val", "valid", "validation"}


class Paths(Sequence[str]):
    """Paths in one array of bytes, which loader processes share; each process would copy a list of strings."""

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, position: Any) -> Any:
        return os.fsdecode(self.blob[self.ends[position] : self.ends[position + 1]].tobytes())

    def name(self, position: int) -> str:
        """Return the path at a position, for messages."""
        return str(self[position])

    def fingerprint(self) -> str:
        """Hash of the paths, sizes and times of modification of all files."""
        return files_fingerprint(self)


def folder(root: Places, eval_root: Places | None = None, **options: Any) -> ImageData:
    """Load images from folders or lists of files, with or without labels.

    The folders directly in ``root`` are the classes if at least two of them contain images and no image lies directly
    in ``root``. Otherwise the images of a folder have no labels.

    Args:
        root: folder of images, of any nesting; or a ``.txt`` file with one path per line; or a ``.csv`` file with the
            column ``path`` and optionally the column ``label``; or a list of these.
        eval_root: labeled test images, in the same forms as ``root``. None holds out a fifth of the labeled images.
        options: fields of :class:`twoview.data.splits.LoadSettings`.

    Raises:
        UserError: if there are no images, or too many images are unreadable.
    """
    return load_splits(list_images, root, eval_root, "folder", LoadSettings(**options))


def list_images(roots: Places, knob: str) -> Split:
    """List image files, in the forms of ``root`` of :func:`folder`.

    Args:
        roots: one or several places.
        knob: knob that named them, for messages.

    Raises:
        UserError: if a place does not exist or has no images.
    """
    paths: list[str] = []
    names: list[str | None] = []
    for root in roots if isinstance(roots, list | tuple) else [roots]:
        where = Path(str(root)).expanduser()
        if where.is_dir():
            found, labels, others = _walk(where)
            require(found, f"{knob}={root}: there are no images in this folder ({others} other files)")
            if others:
                log.info("data: %d files in %s are ignored: their suffixes are not those of images", others, where)
        elif where.is_file() and where.suffix.lower() in (".txt", ".csv"):
            found, labels = read_list(where, knob)
        else:
            message = "there is no such folder, nor .txt or .csv file"
            if where.exists():
                message = "is neither a folder nor a .txt or .csv list of files; give its folder"
            elif str(root).startswith("["):
                message += f'; quote each path of a list, as in {knob}=["A","B"]'
            raise UserError(f"{knob}={root}: {message}")
        paths += found
        names += labels
    return Split(Paths(paths), names)


def _walk(root: Path) -> tuple[list[str], list[str | None], int]:
    found: list[str] = []
    names: list[str | None] = []
    others = 0
    seen: set[str] = set()  # symbolic links may form cycles
    for parent, below, files in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        real = os.path.realpath(parent)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        inside = os.path.relpath(parent, root).split(os.sep)[0]
        images = [n for n in sorted(files) if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")]
        found += [os.path.join(parent, name) for name in images]
        names += [None if inside == "." else inside] * len(images)
        others += len(files) - len(images)
    labelled = None not in names and len(set(names)) > 1
    if labelled and {str(name).lower() for name in names} <= SPLIT_NAMES:
        inside = " and ".join(sorted({str(name) for name in names}))
        advice = f"give data.root={root / 'train'} and data.eval_root=, the other one"
        raise UserError(f"data.root={root}: holds the splits {inside}, not classes; {advice}")
    return found, names if labelled else [None] * len(found), others


def read_list(file: Path, knob: str, column: str = "label") -> tuple[list[str], list[str | None]]:
    """Read a list of files, one path per line in a ``.txt`` file, or a ``.csv`` file with the column ``path``.

    Args:
        file: the list; relative paths in it start in its folder.
        knob: knob that named the file, for messages.
        column: second column of a ``.csv`` file to read.

    Returns:
        Path of each file, and its value in ``column``, None if there is none.

    Raises:
        UserError: if the list cannot be read, is empty, or has no column ``path``.
    """
    try:
        with open_regular(file) as handle:
            text = handle.read().decode("utf-8-sig")
        table = list(csv.reader(io.StringIO(text, newline=""))) if file.suffix.lower() == ".csv" else []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{knob}={file}: cannot be read ({error}); save it as UTF-8") from error
    if file.suffix.lower() == ".txt":
        rows = [{"path": line} for line in text.splitlines() if line.strip()]
    else:
        header, *cells = table or [[]]
        columns = [column.strip().lower() for column in header]
        rows = [dict(zip(columns, (cell.strip() for cell in row), strict=False)) for row in cells if any(row)]
        named = "path" in columns and all(row.get("path") for row in rows)
        require(named, f"{knob}={file}: the first line must name the columns: path, and {column} if there is one")
    require(rows, f"{knob}={file}: the list is empty")
    return [str(file.parent / row["path"]) for row in rows], [row.get(column) or None for row in rows]
