"""Pictures as people have them: folders of any nesting, labelled or not, and lists of files."""

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twoview.data.decode import SUFFIXES
from twoview.data.images import ImageData
from twoview.data.pictures import Split, load_splits
from twoview.errors import UserError

log = logging.getLogger(__name__)


class Paths(Sequence[str]):
    """File names as one byte blob: a list of strings would be copied into every worker, page by page."""

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, position: Any) -> Any:
        return os.fsdecode(self.blob[self.ends[position] : self.ends[position + 1]].tobytes())

    def name(self, position: int) -> str:
        """For messages."""
        return str(self[position])


def folder(root: str | Sequence[str], eval_root: str | Sequence[str] | None = None, **options: Any) -> ImageData:
    """Your own pictures, labelled or not.

    Labels are the first folder below ``root`` that a picture lies in, if there are at least two such folders and no
    pictures beside them.

    Args:
        root: folder of pictures, of any nesting; or a ``.txt`` (a path a line) or ``.csv`` (columns path and, if you
            have them, label) that lists them; or several of these.
        eval_root: the same for labelled test pictures.
        options: as for :func:`twoview.data.pictures.load_splits`.

    Raises:
        UserError: nothing there, or too much of it broken.
    """

    def find(given: str | Sequence[str], knob: str) -> Split:
        paths, names = _list(given, knob)
        return Split(Paths(paths), names)

    return load_splits(find, root, eval_root, "folder", **options)


def _list(roots: str | Sequence[str], knob: str) -> tuple[list[str], list[str | None]]:
    """Paths of pictures and their class names, None where unknown."""
    paths: list[str] = []
    names: list[str | None] = []
    for root in roots if isinstance(roots, list | tuple) else [roots]:
        where = Path(str(root)).expanduser()
        if where.is_dir():
            found, labels, others = _walk(where)
            if not found:
                raise UserError(f"{knob}={root}: there are no pictures in this folder ({others} other files)")
            if others:
                log.info("data: %d files of %s are no pictures by their names and are left alone", others, where)
        elif where.is_file() and where.suffix.lower() in (".txt", ".csv"):
            found, labels = _read_list(where, knob)
        else:
            raise UserError(f"{knob}={root}: there is no such folder, nor .txt or .csv file")
        paths += found
        names += labels
    return paths, names


def _walk(root: Path) -> tuple[list[str], list[str | None], int]:
    found: list[str] = []
    names: list[str | None] = []
    others = 0
    seen: set[str] = set()  # links may lead in circles
    for folder_, below, files in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        real = os.path.realpath(folder_)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        inside = os.path.relpath(folder_, root).split(os.sep)[0]
        pictures = [n for n in sorted(files) if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")]
        found += [os.path.join(folder_, name) for name in pictures]
        names += [None if inside == "." else inside] * len(pictures)
        others += len(files) - len(pictures)
    labelled = None not in names and len(set(names)) > 1
    if labelled and {str(name).lower() for name in names} <= {
        "train",
        "training",
        "test",
        "val",
        "valid",
        "validation",
    }:
        inside = " and ".join(sorted({str(name) for name in names}))
        raise UserError(
            f"data.root={root}: holds the splits {inside}, not classes; give data.root={root / 'train'} and "
            "data.eval_root=, the other one"
        )
    return found, names if labelled else [None] * len(found), others


def _read_list(file: Path, knob: str) -> tuple[list[str], list[str | None]]:
    if file.suffix.lower() == ".txt":
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        rows: list[dict[str, str]] = [{"path": line} for line in lines if line.strip()]
    else:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            header, *cells = list(csv.reader(handle)) or [[]]
        columns = [column.strip().lower() for column in header]
        rows = [dict(zip(columns, (cell.strip() for cell in row), strict=False)) for row in cells if any(row)]
        if not all(row.get("path") for row in rows) or "path" not in columns:
            raise UserError(f"{knob}={file}: the first line must name the columns: path, and label if there are labels")
    if not rows:
        raise UserError(f"{knob}={file}: the list is empty")
    return [str(file.parent / row["path"]) for row in rows], [row.get("label") or None for row in rows]
